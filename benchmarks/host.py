import time, torch, sys, cProfile, pstats, io
import lightning_compile
from lightning_compile.kernels import tiles, fallback, plan as P
from lightning_compile.kernels.operator import linear_attention
def wall(f,n=1000,reps=5):
    for _ in range(20): f()
    best=[]
    for _ in range(reps):
        torch.cuda.synchronize(); t=time.perf_counter()
        for _ in range(n): f()
        best.append((time.perf_counter()-t)/n*1e6); torch.cuda.synchronize()
    best.sort(); return f'{best[0]:.1f}/{best[len(best)//2]:.1f}'
def attn(q,k,v,g):
    n=q.shape[2]; i=torch.arange(n,device=q.device); d=i[:,None]-i[None,:]
    w=torch.where(d>=0,torch.exp(d*g[:,None,None]),0.).to(q.dtype)
    return ((q@k.mT)*w)@v
for b,n in ((1,64),(8,2048)):
    q,k,v=(torch.randn(b,16,n,64,device='cuda',dtype=torch.bfloat16) for _ in range(3)); g=-torch.linspace(.002,.5,16,device='cuda')
    N=1000 if n==64 else 20
    print(b,n)
    with torch.no_grad():
        f=torch.compile(attn,backend='lightning',options={'when':'always'})
        f(q,k,v,g); 
        print(' compiled fwd',wall(lambda:f(q,k,v,g),N),flush=True)
        h=torch.compile(lambda x:x+1); h(g); print(' compiled add',wall(lambda:h(g),N))
        print(' op',wall(lambda:linear_attention(q,k,v,g),N))
        print(' fallback.forward',wall(lambda:fallback.forward(q,k,v,g,None,1.,False,False,False,False),N))
        print(' tiles.forward',wall(lambda:tiles.forward(q,k,v,g,None,1.,False,False,False,False),N))
        given=(v,q,k,g,None); pl=tiles.plans.find((None,1.,False,False,False,False,*P.signature(given)))
        print(' signature',wall(lambda:P.signature(given),N),' find',wall(lambda:tiles.plans.find((None,1.,False,False,False,False,*P.signature(given))),N))
        print(' plan()',wall(lambda:pl(given),N))
        tens=list(given)
        for s in pl.steps:
            s(tens); 
        for s in pl.steps:
            print('  step',getattr(getattr(s,'kernel',None),'__name__',s.__qualname__ if hasattr(s,'__qualname__') else s), wall(lambda:s(tens[:]),N))
            if isinstance(s,P.Launch): L=s
        print('  data_ptrs',wall(lambda:[tens[p].data_ptr() for p in L.distinct],N))
        print('  new_empty',wall(lambda:q.new_empty(q.shape),N),' empty_like',wall(lambda:torch.empty_like(q),N),'empty_strided',wall(lambda: torch._C._dynamo.guards._empty_strided_cuda(q.shape,q.stride(),q.dtype),N))
        import triton
        @triton.jit
        def nop(X): pass
        c=nop[(1,)](q)[(1,1,1)] if False else nop.warmup(q,grid=(1,))
        r=c[(1,1,1)]; a=q.data_ptr(); print('  triton nop launch',wall(lambda:r(a),N))
        if n==64:
            for fn,nm in ((lambda:[f(q,k,v,g) for _ in range(2000)],'compiled'),(lambda:[linear_attention(q,k,v,g) for _ in range(2000)],'op')):
                p=cProfile.Profile(); p.enable(); fn(); p.disable(); st=io.StringIO(); pstats.Stats(p,stream=st).sort_stats('tottime').print_stats(14); print('\n'.join(x for x in st.getvalue().splitlines()[6:] if x.strip()))
    L=[x.clone().requires_grad_() for x in (q,k,v)]; do=torch.randn_like(v)
    f2=torch.compile(attn,backend='lightning',options={'when':'always'})
    def both(): torch.autograd.grad(f2(*L,g),L,do)
    both(); print(' compiled both',wall(both,N//2))
    print(' compiled fwd recorded',wall(lambda:f2(*L,g),N//2))
    bw=lambda:torch.ops.lightning.linear_attention_backward.default(do,None,None,q,k,v,g,None,None,1.,False,False,[True,True,True,False,False])
    with torch.no_grad(): bw(); print(' bwd op',wall(bw,N))
    class E(torch.autograd.Function):
        @staticmethod
        def forward(ctx,q,k,v): ctx.save_for_backward(q,k,v); return torch.empty_like(q)
        @staticmethod
        def backward(ctx,g): return tuple(torch.empty_like(x) for x in ctx.saved_tensors)
    print(' empty Function both',wall(lambda:torch.autograd.grad(E.apply(*L),L,do),N//2))
    if n==64:
        h2=torch.compile(lambda a,b,c:a*b*c); h2(*L); print(' compiled mul both (inductor)',wall(lambda:torch.autograd.grad(h2(*L),L,do),N//2),flush=True)
        import threading
        with torch.autograd.set_multithreading_enabled(False): print(' compiled both, single thread',wall(both,N//2))
