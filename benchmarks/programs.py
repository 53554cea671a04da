"""The workloads as plain maths, one cascade each. Nothing here says how anything runs."""

from __future__ import annotations

SCALED = "(sum[e] {q}[{head},m,e] * {k}[{key},n,e]) / sqrt(E)"


def attention(group: int = 1, score: str = "{s}", where: str = "", params: str = "", square: bool = False) -> str:
    """Scaled dot-product attention.

    `group` query heads share a key head; `score` rewrites the scaled score `{s}` and `where` says which keys a query
    sees; `params` are further parameters; `square` says that there are as many keys as queries.
    """
    key = f"b,h//{group}" if group > 1 else "b,h"
    result = ": bf16" if "f32" in params else ""  # a parameter of 32 bits would make the result one, too
    heads, rows = ("G" if group > 1 else "H"), ("M" if square else "N")
    scaled = f"({SCALED.format(q='Q', k='K', head='b,h', key=key)})"
    given = f"Q[B,H,M,E], K[B,{heads},{rows},E], V[B,{heads},{rows},F]{params}"
    return f"""cascade attention({given}) -> O{result}[B,H,M,F] {{
    S[b,h,m,n] = {score.format(s=scaled)}{where and f"   where {where}"}
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] * V[{key},n,f]
}}
"""


def prefixed(group: int) -> str:
    """Attention of one new token where sequences have their first keys in common, each followed by keys of its own."""
    key = f"h//{group}" if group > 1 else "h"
    heads = "G" if group > 1 else "H"
    given = f"Q[B,H,E], C[{heads},L,E], W[{heads},L,F], K[B,{heads},N,E], V[B,{heads},N,F]"
    return f"""cascade prefixed({given}) -> O[B,H,F] {{
    T[b,h,l] = Q[b,h,e] * C[{key},l,e] / sqrt(E)
    S[b,h,n] = Q[b,h,e] * K[b,{key},n,e] / sqrt(E)
    R[b,h]   = max(max[l] T[b,h,l], max[n] S[b,h,n])
    D[b,h]   = sum[l] exp(T[b,h,l] - R[b,h]) + sum[n] exp(S[b,h,n] - R[b,h])
    A[b,h,f] = sum[l] exp(T[b,h,l] - R[b,h]) * W[{key},l,f]
    O[b,h,f] = (A[b,h,f] + sum[n] exp(S[b,h,n] - R[b,h]) * V[b,{key},n,f]) / D[b,h]
}}
"""


def decode(group: int, ragged: bool = False) -> str:
    """Attention of one new token: a single query for every head; `group` query heads share a key head.

    A ragged batch has keys up to `len`, another number for every row.
    """
    key = f"b,h//{group}" if group > 1 else "b,h"
    heads = "G" if group > 1 else "H"
    lengths, where = (", len: i32[B]", "   where n < len[b]") if ragged else ("", "")
    return f"""cascade decode(Q[B,H,E], K[B,{heads},N,E], V[B,{heads},N,F]{lengths}) -> O[B,H,F] {{
    S[b,h,n] = (sum[e] Q[b,h,e] * K[{key},n,e]) / sqrt(E){where}
    P[b,h,n] = softmax[n] S[b,h,n]
    O[b,h,f] = sum[n] P[b,h,n] * V[{key},n,f]
}}
"""


def paged(group: int) -> str:
    """The same with keys and values in pages of W rows: each batch has a list of them, and its last may be short."""
    key = f"pages[b,l],h//{group},w"
    given = "Q[B,H,E], K[C,G,W,E], V[C,G,W,F], pages: i32[B,L], len: i32[B]"
    return f"""cascade paged({given}) -> O[B,H,F] {{
    S[b,h,l,w] = (sum[e] Q[b,h,e] * K[{key},e]) / sqrt(E)   where l*W + w < len[b]
    P[b,h,l,w] = softmax[l,w] S[b,h,l,w]
    O[b,h,f]   = sum[l,w] P[b,h,l,w] * V[{key},f]   where l*W + w < len[b]
}}
"""


def picture(where: str) -> str:
    """Attention between the places of a picture, of rows and columns; `where` says which places one sees."""
    return f"""cascade picture(Q[B,H,I,J,E], K[B,H,I,J,E], V[B,H,I,J,F]) -> O[B,H,I,J,F] {{
    S[b,h,i,j,x,y] = (sum[e] Q[b,h,i,j,e] * K[b,h,x,y,e]) / sqrt(E){where and f"   where {where}"}
    P[b,h,i,j,x,y] = softmax[x,y] S[b,h,i,j,x,y]
    O[b,h,i,j,f]   = sum[x,y] P[b,h,i,j,x,y] * V[b,h,x,y,f]
}}
"""


DIFFERENTIAL = """
cascade differential(Q[B,H,M,E], K[B,H,N,E], R[B,H,M,E], L[B,H,N,E], V[B,H,N,F], lam: f32[H]) -> O: bf16[B,H,M,F] {
    S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E)   where n <= m
    T[b,h,m,n] = (sum[e] R[b,h,m,e] * L[b,h,n,e]) / sqrt(E)   where n <= m
    A[b,h,m,n] = softmax[n](S[b,h,m,n]) - lam[h] * softmax[n](T[b,h,m,n])
    O[b,h,m,f] = sum[n] A[b,h,m,n] * V[b,h,n,f]
}
"""

SIGMOID = """
cascade gated(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]) -> O[B,H,M,F] {
    P[b,h,m,n] = sigmoid((sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E) - log(N))   where n <= m
    O[b,h,m,f] = sum[n] P[b,h,m,n] * V[b,h,n,f]
}
"""

RMSNORM = """
cascade rmsnorm_rows(X[M,N], g[N]) -> Y[M,N] {
    Y[m,n] = X[m,n] * rsqrt((mean[n] X[m,n] * X[m,n]) + 1e-6) * g[n]
}
"""

RESIDUAL_RMSNORM = """
cascade residual_rmsnorm(X[M,N], R[M,N], g[N]) -> A[M,N], Y[M,N] {
    A[m,n] = X[m,n] + R[m,n]
    Y[m,n] = A[m,n] * rsqrt((mean[n] A[m,n] * A[m,n]) + 1e-6) * g[n]
}
"""

LAYERNORM = """
cascade layernorm_rows(X[M,N], g[N], h[N]) -> Y[M,N] {
    U[m] = mean[n] X[m,n]
    W[m] = mean[n] (X[m,n] - U[m]) * (X[m,n] - U[m])
    Y[m,n] = (X[m,n] - U[m]) * rsqrt(W[m] + 1e-5) * g[n] + h[n]
}
"""

SOFTMAX = """
cascade softmax_rows(X[M,N]) -> Y[M,N] {
    Y[m,n] = softmax[n] X[m,n]
}
"""

ENTROPY = """
cascade entropy(X[M,N]) -> H[M] {
    P[m,n] = softmax[n] X[m,n]
    H[m] = -(sum[n] P[m,n] * log(P[m,n]))
}
"""

KL = """
cascade divergence(X[M,N], Z[M,N]) -> D[M] {
    P[m,n] = logsoftmax[n] X[m,n]
    Q[m,n] = logsoftmax[n] Z[m,n]
    D[m] = sum[n] exp(P[m,n]) * (P[m,n] - Q[m,n])
}
"""

VARIANCE = """
cascade variance(X[M,N]) -> W[M] {
    U[m] = mean[n] X[m,n]
    W[m] = mean[n] (X[m,n] - U[m]) * (X[m,n] - U[m])
}
"""

CUMULATIVE_SUM = """
cascade cumulative_sum(X[M,N]) -> C[M,N] {
    C[m,n] = C[m,n-1] + X[m,n]   init C[m,-1] = 0
}
"""

ROUTE = """
cascade route(X[T,N]) -> G[T,8], I[T,8] {
    P[t,n] = softmax[n] X[t,n]
    W[t,k], I[t,k] = topk[n, 8] P[t,n]
    G[t,k] = W[t,k] / (sum[k] W[t,k])
}
"""

CROSS_ENTROPY = """
cascade cross_entropy(Z[T,N], y: i64[T]) -> L[] {
    P[t] = (logsumexp[n] Z[t,n]) - Z[t,y[t]]
    L = mean[t] P[t]
}
"""

MATMUL = """
cascade matmul(A[M,K], B[K,N]) -> C[M,N] {
    C[m,n] = sum[k] A[m,k] * B[k,n]
}
"""

MATMUL_GELU = """
cascade matmul_gelu(A[M,K], B[K,N], bias[N]) -> C[M,N] {
    C[m,n] = gelu((sum[k] A[m,k] * B[k,n]) + bias[n])
}
"""

MATMUL_BATCHED = """
cascade matmul_batched(A[B,M,K], W[B,K,N]) -> C[B,M,N] {
    C[b,m,n] = sum[k] A[b,m,k] * W[b,k,n]
}
"""

RMSNORM_LINEAR = """
cascade rmsnorm_linear(X[T,D], g[D], W[F,D]) -> Y[T,F] {
    N[t,d] = X[t,d] * rsqrt(mean[d] X[t,d] * X[t,d] + 1e-6) * g[d]
    Y[t,f] = N[t,d] * W[f,d]
}
"""

LAYERNORM_LINEAR = """
cascade layernorm_linear(X[T,D], g[D], W[F,D]) -> Y[T,F] {
    U[t]   = mean[d] X[t,d]
    S[t]   = mean[d] (X[t,d] - U[t]) * (X[t,d] - U[t])
    N[t,d] = (X[t,d] - U[t]) * rsqrt(S[t] + 1e-6) * g[d]
    Y[t,f] = N[t,d] * W[f,d]
}
"""

INT8_LINEAR = """
cascade int8_linear(X[T,D], W: i8[F,D], s[F]) -> Y[T,F] {
    Y[t,f] = sum[d] X[t,d] * W[f,d] * s[f]
}
"""

INT4_LINEAR = """
cascade int4_linear(X[T,D], W: i8[F,E], s[F,G]) -> Y: bf16[T,F] {
    Q[f,d] = cast(select(d % 2 == 0, W[f,d // 2] % 16, W[f,d // 2] // 16 % 16) - 8, bf16)
    Y[t,f] = X[t,d] * Q[f,d] * s[f,d // 128]
}
"""

GATED_MLP = """
cascade gated_mlp(X[T,D], G[F,D], U[F,D], W[D,F]) -> Y[T,D] {
    H[t,f] = silu(sum[d] X[t,d] * G[f,d]) * (sum[d] X[t,d] * U[f,d])
    Y[t,d] = H[t,f] * W[d,f]
}
"""

EXPERTS = """
cascade experts(X[T,D], R[D,N], G[N,D,F], U[N,D,F], V[N,F,D]) -> Y[T,D] {{
    W[t,j], I[t,j] = topk[n, {chosen}] softmax[n] (sum[d] X[t,d] * R[d,n])
    H[t,j,f] = silu(sum[d] X[t,d] * G[I[t,j],d,f]) * (sum[d] X[t,d] * U[I[t,j],d,f])
    Y[t,d] = sum[j] W[t,j] / (sum[j] W[t,j]) * (sum[f] H[t,j,f] * V[I[t,j],f,d])
}}
"""

LINEAR_LOSS = """
cascade linear_loss(X[T,D], W[V,D], y: i64[T]) -> L: f32[T] {
    Z[t,v] = X[t,d] * W[v,d]
    L[t]   = (logsumexp[v] Z[t,v]) - Z[t,y[t]]
}
"""

LINEAR_KL = """
cascade linear_kl(X[T,D], W[V,D], U[T,E], M[V,E]) -> L: f32[T] {
    S[t,v] = X[t,d] * W[v,d]
    H[t,v] = U[t,e] * M[v,e]
    A[t,v] = S[t,v] - logsumexp[v] S[t,v]
    B[t,v] = H[t,v] - logsumexp[v] H[t,v]
    L[t]   = sum[v] exp(B[t,v]) * (B[t,v] - A[t,v])
}
"""
