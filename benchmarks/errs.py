import sys, torch, glob
sys.path.insert(0,'/tmp/site')
from probe import setv
from lightning_compile.kernels import reference
from lightning_compile.kernels.operator import linear_attention
def exact(q,k,v,g,do,c=512):
    q,k,v,g=(x.double().requires_grad_() for x in (q,k,v,g)); b,h,n,d=q.shape
    S=torch.zeros(b,h,d,d,device='cuda',dtype=torch.float64); out=[]
    for i in range(0,n,c):
        Q,K,V,G=(x[:,:,i:i+c] for x in (q,k,v,g)); s=G.cumsum(-1); m=Q.shape[2]
        w=(s[...,:,None]-s[...,None,:]).masked_fill(~torch.ones(m,m,dtype=torch.bool,device='cuda').tril(),float('-inf')).exp()
        out.append((Q@K.mT*w)@V+(Q*s.exp()[...,None])@S); S=S*s[...,-1].exp()[...,None,None]+(K*(s[...,-1:]-s).exp()[...,None]).mT@V
    return torch.autograd.grad(torch.cat(out,2),(q,k,v,g),do.double())
try:
    from fla.ops import simple_gla
except Exception as e: simple_gla=None; print('no fla',e)
for n in (1024,16384):
  for d in (64,128):
    for nm,hi,lo in (('strong',-.5,-3.),('mid',0,-.1),('weak',0,-1e-3),('tiny',0,-1e-6)):
        torch.manual_seed(1); b,h=1,4
        q,k,v,do=(torch.randn(b,h,n,d,device='cuda',dtype=torch.bfloat16) for _ in range(4)); g=hi+(lo-hi)*torch.rand(b,h,n,device='cuda')
        ex=exact(q,k,v,g,do); row=[]
        def rel(a): return ' '.join(f'{float((x.double()-y).norm()/y.norm()):.1e}' for x,y in zip(a,ex))
        for bt in (256,512,1024):
            setv({'between':bt})
            L=[x.clone().requires_grad_() for x in (q,k,v,g)]
            a=torch.autograd.grad(linear_attention(*L)[0],L,do); row.append(f'{bt}: '+(rel(a) if bt==256 else rel(a).split()[-1]))
        if simple_gla and len(sys.argv)>1:
            L=[x.clone().requires_grad_() for x in (q,k,v,g)]
            oo=simple_gla.chunk_simple_gla(*(x.transpose(1,2) for x in L[:3]),g=L[3].transpose(1,2),scale=1.0)[0].transpose(1,2)
            row.append('fla: '+rel(torch.autograd.grad(oo,L,do)))
        print(n,d,nm,' | '.join(row),flush=True)
