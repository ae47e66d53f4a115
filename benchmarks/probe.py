"""scratch"""
import sys, time, json, os, concurrent.futures as cf
import torch
from lightning_compile.kernels import tiles, schedule as S, sweeps, plan as P, reference
from lightning_compile.kernels.operator import linear_attention
ORIG={k:dict(v) for k,v in S._HALF.items()}; ORIGP=dict(S._HALF_PAIR)
def setv(v):
    for k in S._HALF: S._HALF[k].clear(); S._HALF[k].update(ORIG[k])
    S._HALF_PAIR.clear(); S._HALF_PAIR.update(ORIGP)
    sweeps.BETWEEN=v.get('between',256)
    for k,row in v.items():
        if isinstance(k,tuple): S._HALF[k[0]][k[1]]=row
    if v.get('nopair64'): S._HALF_PAIR.clear()
    tiles.plans.clear()
def ops(b,h,n,d,decay,dev='cuda'):
    f=(lambda *s:torch.randn(*s,device=dev,dtype=torch.bfloat16)) if dev=='cuda' else (lambda *s: torch.empty(*s,device='meta',dtype=torch.bfloat16))
    q,k,v,do=(f(b,h,n,d) for _ in range(4))
    g=None
    if decay=='head': g=-torch.linspace(0.002,0.5,h,device=dev) if dev=='cuda' else torch.empty(h,device=dev)
    if decay=='step': g=-torch.rand(b,h,n,device=dev)*0.1 if dev=='cuda' else torch.empty(b,h,n,device=dev)
    return q,k,v,g,do
A=(8,16,8192,128); B=(8,16,8192,64); C=(1,16,131072,128); F=(4,8,8192,256)
o='output';os_='output with sums';p='pair';ps='pair with sums'
VARS=[
 ('A',A,'step',True,{}),
 ('A ows 4w2',A,'step',True,{(os_,128):(64,64,4,2)}),
 ('A ows 4w3',A,'step',True,{(os_,128):(64,64,4,3)}),
 ('A apart 8w3',A,'step',True,{(ps,128):(64,128,8,3,True)}),
 ('A apart 4w2',A,'step',True,{(ps,128):(64,64,4,2,True)}),
 ('A apart 4w3',A,'step',True,{(ps,128):(64,64,4,3,True)}),
 ('A 512',A,'step',True,{'between':512}),
 ('A head',A,'head',False,{}),
 ('A head apart 8w2',A,'head',False,{(p,128):(64,128,8,2,True)}),
 ('A head apart 4w2',A,'head',False,{(p,128):(64,64,4,2,True)}),
 ('A head apart 4w3',A,'head',False,{(p,128):(64,64,4,3,True)}),
 ('A head out 4w2',A,'head',False,{(o,128):(64,64,4,2)}),
 ('A head out 4w3',A,'head',False,{(o,128):(64,64,4,3)}),
 ('B',B,'step',True,{}),
 ('B apart 4w2',B,'step',True,{(ps,64):(64,64,4,2,True)}),
 ('B apart 4w3',B,'step',True,{(ps,64):(64,64,4,3,True)}),
 ('B 512',B,'step',True,{'between':512}),
 ('B head',B,'head',False,{}),
 ('B head apart 4w3',B,'head',False,{(p,64):(64,64,4,3,True),'nopair64':1}),
 ('F',F,'head',False,{}),
 ('F out128 8w2',F,'head',False,{(o,256):(64,128,8,2)}),
 ('F out128 8w1',F,'head',False,{(o,256):(64,128,8,1)}),
 ('F apart 8w1',F,'head',False,{(p,256):(64,64,8,1,True)}),
 ('C',C,'head',False,{}),
 ('C step',C,'step',True,{}),
]
def plans_of(shape,decay,learned,dev):
    q,k,v,g,do=ops(*shape,decay,dev)
    given=(v,q,k,g,None)
    f=tiles.plan_forward(given,1.0,False,False,False,False)
    gb=(*given,do,None,None,None)
    b=tiles.plan_backward(gb,1.0,False,False,True,True,True,learned,False)
    return (f,given),(b,gb)
def comp(i):
    name,shape,decay,learned,v=VARS[i]
    setv(v)
    try:
        for pl,_ in plans_of(shape,decay,learned,'meta'):
            for l in pl.launches: l.compile()
    except Exception as e: return f'{name}: {type(e).__name__} {str(e)[:200]}'
def main():
    only=sys.argv[1] if len(sys.argv)>1 else ''
    t=time.time()
    import multiprocessing as mp
    with cf.ProcessPoolExecutor(14,mp_context=mp.get_context('spawn')) as ex:
        for r in ex.map(comp,range(len(VARS))):
            if r: print(r)
    print('compiled',round(time.time()-t,1),flush=True)
    from triton.testing import do_bench
    x=torch.empty(1<<31,dtype=torch.uint8,device='cuda'); y=torch.empty_like(x)
    sp=2*x.numel()/(do_bench(lambda:y.copy_(x),return_mode='median')*1e-3); print('copy GB/s',sp/1e9); del x,y
    ref={}
    for name,shape,decay,learned,v in VARS:
        try:
            setv(v); torch.manual_seed(0)
            (f,fg),(b,bg)=plans_of(shape,decay,learned,'cuda')
            res=[*f(fg)[:1],*b(bg)[:4]]; torch.cuda.synchronize()
            base=name.split()[0]+(' '+decay); err=''
            if base not in ref: ref[base]=[r.cpu() for r in res]
            else:
                err=' '.join(f'{float((r.float().cpu()-z.float()).norm()/z.float().norm()):.1e}' for r,z in zip(res,ref[base]) if z.numel())
            lim=[4*torch.Size(shape).numel()*2/sp*1e6,11*torch.Size(shape).numel()*2/sp*1e6]
            tot=[];parts=[]
            for pl,gv in ((f,fg),(b,bg)):
                tens=list(gv); ts=[]
                for s in pl.steps: s(tens)
                for s in pl.steps:
                    if isinstance(s,P.Launch):
                        m=do_bench(lambda:s(tens),warmup=5,rep=30,return_mode='median')*1e3
                        c=s.constants; ts.append(m); nm=s.kernel.__name__
                        parts.append((nm if nm!='sweep' else f"sweep{'R' if c['REVERSE'] else ''}{'' if c['OUTPUT'] else 'states'} sum{c['SUM']} {'pair' if c['COMPANION'] else ''}{'apart' if c['APART'] else ''} BO{c['BO']} w{s.options['num_warps']} s{s.options['num_stages']}")+f': {m:.0f}')
                tot.append(sum(ts)); del tens
            print(f'{name:18s} fwd {tot[0]:.0f} {100*lim[0]/tot[0]:.0f}% both {sum(tot):.0f} {100*lim[1]/sum(tot):.0f}% | {err} | '+'; '.join(parts),flush=True)
            del f,b,fg,bg,res
        except Exception as e: print(name,type(e).__name__,str(e)[:300],flush=True)
        torch.cuda.empty_cache()
if __name__=='__main__': main()
