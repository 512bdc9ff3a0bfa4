import ast,re,sys,collections,builtins,keyword
R="/work/main/"
rows=[];cur=None
for l in open("list.txt"):
    l=l.strip()
    if not l: continue
    if l[0]=="@": cur=l[1:]; continue
    p=l.split()
    if p[0]==p[1]: continue
    rows.append((cur,p[0],p[1],p[2] if len(p)>2 else ""))
def binds(node):
    """names bound directly in scope of node (not nested defs), with kinds"""
    out=collections.Counter()
    def walk(n,top=False):
        for c in ast.iter_child_nodes(n):
            if isinstance(c,(ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef)):
                out[c.name]+=1
                continue
            if isinstance(c,ast.Lambda): continue
            if isinstance(c,ast.Name) and isinstance(c.ctx,ast.Store): out[c.id]+=1
            if isinstance(c,ast.ExceptHandler) and c.name: out[c.name]+=1
            if isinstance(c,(ast.Import,ast.ImportFrom)):
                for a in c.names: out[(a.asname or a.name).split(".")[0]]+=1
            if isinstance(c,ast.arguments): continue
            walk(c)
    walk(node)
    return out
def params(f):
    a=f.args
    return [x.arg for x in a.posonlyargs+a.args+a.kwonlyargs]+([a.vararg.arg] if a.vararg else [])+([a.kwarg.arg] if a.kwarg else [])
def child(scope,name):
    for c in ast.walk(scope) if not isinstance(scope,(ast.Module,ast.ClassDef)) else scope.body:
        if isinstance(c,(ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef)) and c.name==name and c is not scope: return c
bad=0
scopes=collections.defaultdict(dict)
trees={}
for path,q,new,_ in rows:
    t=trees.setdefault(path,ast.parse(open(R+path).read()))
    m=re.fullmatch(r"([\w.]+)(?:\((\w+)\)|:(\w+))?",q)
    chain,par,loc=m.groups()
    parts=chain.split(".")
    n=t
    for p in parts[:-1]: 
        n=child(n,p)
        if n is None: print("NO SCOPE",path,q);bad+=1;break
    if n is None: continue
    key=None
    if par or loc:
        f=child(n,parts[-1])
        if f is None: print("NOFUNC",path,q);bad+=1;continue
        names=set(binds(f))|set(params(f))
        if par and par not in params(f): print("NOPARAM",path,q);bad+=1
        if loc and loc not in names: print("NOLOCAL",path,q);bad+=1
        # comprehension-only?
        old=par or loc
        key=(path,chain+"()"); allnames=names
    else:
        old=parts[-1]
        if isinstance(n,ast.ClassDef):
            names=set(binds(n))
            for x in ast.walk(n):
                if isinstance(x,ast.Attribute) and isinstance(x.ctx,ast.Store) and isinstance(x.value,ast.Name) and x.value.id=="self": names.add(x.attr)
        else: names=set(binds(n))
        if old not in names: print("NONAME",path,q);bad+=1
        key=(path,".".join(parts[:-1])); allnames=names
    scopes[key].setdefault("names",allnames)
    ren=scopes[key].setdefault("ren",{})
    if old in ren: print("DUP",path,q)
    ren[old]=new
    if keyword.iskeyword(new) or new in dir(builtins): print("BUILTIN",path,q,new)
for k,s in scopes.items():
    final=[s["ren"].get(n,n) for n in s["names"]]
    c=[x for x,v in collections.Counter(final).items() if v>1]
    if c: print("COLLISION",k,c)
# local shadows module name
for k,s in scopes.items():
    if k[1].endswith("()"):
        mod=set(binds(trees[k[0]])); mr=scopes.get((k[0],""),{}).get("ren",{})
        final={mr.get(n,n) for n in mod}
        sh=[v for v in s["ren"].values() if v in final]
        if sh: print("SHADOW",k,sh)
rows.sort(key=lambda r:(r[0],0 if "(" in r[1] or ":" in r[1] else 1 if "." in r[1] else 2))
with open("/tmp/pal/renames/cli.tsv","w") as f:
    for p,q,n,w in rows: f.write("\t".join([p,q,n]+([w] if w else []))+"\n")
print(len(rows),"rows",bad,"bad")
# imports across files: would new module-level name collide in importing files?
import pathlib
modmap={p[:-3].replace("/","."):{} for p,_,_,_ in rows}
for p,q,n,w in rows:
    if re.fullmatch(r"\w+",q): modmap[p[:-3].replace("/",".")][q]=n
for fp in pathlib.Path(R).rglob("*.py"):
    if ".venv" in str(fp): continue
    t=ast.parse(fp.read_text()); rel=str(fp.relative_to(R))
    own=scopes.get((rel,""),{}).get("ren",{})
    base=collections.Counter({own.get(k,k):1 for k in binds(t)})
    imps={}
    for x in ast.walk(t):
        if isinstance(x,ast.ImportFrom) and x.module in modmap:
            for a in x.names:
                if a.name in modmap[x.module] and not a.asname: imps[a.name]=modmap[x.module][a.name]
    allnames={x.id for x in ast.walk(t) if isinstance(x,ast.Name)}|{x.arg for x in ast.walk(t) if isinstance(x,ast.arg)}
    for old,new in imps.items():
        if new in allnames: print("IMPORT-CLASH?",rel,old,"->",new)
    for s in scopes:
        if s[0]==rel and s[1].endswith("()"):
            sh=set(scopes[s]["ren"].values())&set(imps.values())
            if sh: print("LOCAL-SHADOWS-IMPORT",s,sh)
