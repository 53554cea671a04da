"""The Python frontend: index notation and torch's style against the text that they mean, names, and the places of
mistakes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cascade
from cascade.compiled import compile as compile_
from cascade.errors import TraceError
from cascade.frontend import trace as cs
from cascade.frontend.build import parse_cascade
from cascade.interp import run
from cascade.ir import Cascade, DType
from cascade.text import render
from cascade.verify import verify


def text_of(cascade: Cascade) -> str:
    """The cascade alone, without the definitions that travel with it."""
    return render(cascade)[render(cascade).index(f"cascade {cascade.name}(") :]


def check(function: Callable[..., Any], expected: str, **options: Any) -> Cascade:
    """Traces the function; the result is the cascade of the text, printed in the same way, and valid."""
    cascade = cs.trace(function, **options)
    assert text_of(cascade) == inspect.cleandoc(expected) + "\n"
    assert parse_cascade(render(cascade)) == cascade
    assert parse_cascade(inspect.cleandoc(expected)) == cascade  # the library's definitions are found by name
    verify(cascade)
    return cascade


def refused(function: Callable[..., Any], code: str, at: str, **options: Any) -> TraceError:
    """Traces the function, which fails with `code` at the first occurrence of `at` in its source."""
    with pytest.raises(TraceError) as caught:
        cs.trace(function, **options)
    found = caught.value.diagnostics[0]
    assert found.code == code, str(caught.value)
    assert found.span is not None and found.help
    assert found.span.source.name == __file__
    lines, first = inspect.getsourcelines(function)
    row = next(i for i, line in enumerate(lines) if at in line)
    start = lines[row].index(at) + 1
    assert (found.span.line, found.span.column) == (first + row, start), str(caught.value)
    assert (found.span.end_line, found.span.end_column) == (first + row, start + len(at)), str(caught.value)
    return caught.value


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention() -> None:
    def attention(Q, K, V):
        b, h, m, n, e, f = cs.ranks("b h m n e f")
        S = (cs.sum[e](Q[b, h, m, e] * K[b, h, n, e]) / cs.sqrt(e.extent)).where(n <= m)
        P = cs.exp(S - cs.max[n](S))
        return (cs.sum[n](P * V[b, h, n, f]) / cs.sum[n](P))[b, h, m, f]

    check(
        attention,
        """
        cascade attention(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]) -> out[B,H,M,F] {
            S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E) where n <= m
            P[b,h,m,n] = exp(S[b,h,m,n] - max[n] S[b,h,m,n])
            out[b,h,m,f] = (sum[n] P[b,h,m,n] * V[b,h,n,f]) / sum[n] P[b,h,m,n]
        }
        """,
    )


def test_grouped_query_window_and_softmax_of_the_library() -> None:
    def windowed(Q, K, V, window=8, group=4):
        b, h, m, n, e, f = cs.ranks("b h m n e f")
        near = (n <= m) & (m - n < window)
        S = cs.sum[e](Q[b, h, m, e] * K[b, h // group, n, e]) * e.extent**-0.5
        P = cs.softmax[n](S.where(near))
        O = cs.sum[n](P * V[b, h // group, n, f])
        return O[b, h, m, f]

    expected = """
        cascade windowed(Q[B,H,M,E], K[B,K1,N,E], V[B,V1,N,F]) -> O[B,H,M,F] {{
            S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h//4,n,e]) * pow(E, -0.5)
            T[b,h,m,n] = S[b,h,m,n] where n <= m and m - n < {window}
            P[b,h,m,n] = softmax[n] T[b,h,m,n]
            O[b,h,m,f] = sum[n] P[b,h,m,n] * V[b,h//4,n,f]
        }}
        """
    check(windowed, expected.format(window=8))
    check(windowed, expected.format(window=64), options={"window": 64})


def test_alibi_softcap_documents_and_two_results() -> None:
    def scored(Q, K, V, slope, scale, doc):
        b, h, m, n, e, f = cs.ranks("b h m n e f=64")
        same = doc[b, m] == doc[b, n]
        distance = m - n
        S = cs.sum[e](Q[b, h, m, e] * K[b, h, n, e]) * scale - slope[h] * distance
        S = (30 * cs.tanh(S / 30)).where(same & (n <= m))
        L = cs.logsumexp[n](S)
        return cs.sum[n](cs.exp(S - L) * V[b, h, n, f])[b, h, m, f], L.fill(-math.inf)

    check(
        scored,
        """
        cascade scored(Q[B,H,M,E], K[B,H,M,E], V[B,H,M,64], slope[H], scale[], doc[B,M]) -> out[B,H,M,64], \
L[B,H,M] fill -inf {
            S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h,n,e]) * scale - slope[h] * (m - n)
            S_1[b,h,m,n] = 30 * tanh(S[b,h,m,n] / 30) where doc[b,m] == doc[b,n] and n <= m
            L[b,h,m] = logsumexp[n] S_1[b,h,m,n]
            out[b,h,m,f] = sum[n] exp(S_1[b,h,m,n] - L[b,h,m]) * V[b,h,n,f]
        }
        """,
    )


def test_paged_and_ragged_attention() -> None:
    def paged(Q, K, V, pages, length):
        b, h, m, n, e, f = cs.ranks("b h m n e f")
        page = pages[b, n // 16]
        S = cs.sum[e](Q[b, h, m, e] * K[page, h, n % 16, e]).where(n < length[b])
        return cs.sum[n](cs.softmax[n](S) * V[page, h, n % 16, f]).default(0)[b, h, m, f]

    cascade = cs.trace(paged)
    assert [render(cascade).count(part) for part in ("pages[b,n//16]", "where n < length[b]", "?? 0")] == [2, 1, 1]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_layernorm_swiglu_and_library_functions() -> None:
    layernorm = cs.library_callable("layernorm")

    def block(X, g, b, Wg, Wu, Wd):
        t, d, f = cs.ranks("t d f")
        N = layernorm[d](X[t, d], g[d], b[d])
        H = cs.silu(cs.sum[d](N * Wg[d, f])) * cs.sum[d](N * Wu[d, f])
        return X[t, d] + cs.sum[f](H * Wd[f, d])

    cascade = check(
        block,
        """
        cascade block(X[T,D], g[D], b[D], Wg[D,F], Wu[D,F], Wd[F,D]) -> out[T,D] {
            N[t,d] = layernorm[d](X[t,d], g[d], b[d])
            H[t,f] = silu(sum[d] N[t,d] * Wg[d,f]) * sum[d] N[t,d] * Wu[d,f]
            out[t,d] = X[t,d] + sum[f] H[t,f] * Wd[f,d]
        }
        """,
    )
    assert [definition.name for definition in cascade.uses] == ["mean", "layernorm_eps", "layernorm"]


def test_mixture_of_experts() -> None:
    def moe(X, Wr, W1, W2):
        t, d, n, f = cs.ranks("t d n f")
        j = cs.ranks("j=2")
        G, I = cs.topk[n, j](cs.softmax[n](cs.sum[d](X[t, d] * Wr[d, n])))
        H = cs.silu(cs.sum[d](X[t, d] * W1[I[t, j], d, f]))
        Y = cs.sum[j](G / cs.sum[j](G) * cs.sum[f](H * W2[I, f, d]))
        return Y

    check(
        moe,
        """
        cascade moe(X[T,D], Wr[D,N], W1[N,D,F], W2[N,F,D]) -> Y[T,D] {
            G[t,j], I[t,j] = topk[n, 2] softmax[n] sum[d] X[t,d] * Wr[d,n]
            H[t,j,f] = silu(sum[d] X[t,d] * W1[I[t,j],d,f])
            Y[t,d] = sum[j] G[t,j] / (sum[j] G[t,j]) * sum[f] H[t,j,f] * W2[I[t,j],f,d]
        }
        """,
    )


def test_topk_takes_a_number_and_a_filter() -> None:
    def best(R):
        t, n, j = cs.ranks("t n j")
        values, places = cs.topk[n, 3, j](R[t, n], where=n != t)
        return values, places

    check(
        best,
        """
        cascade best(R[T,N]) -> values[T,3], places[T,3] {
            values[t,j], places[t,j] = topk[n, 3] R[t,n] where n != t
        }
        """,
    )


def test_convolution_and_strides() -> None:
    def conv(X, W):
        b, t, w, c, d = cs.ranks("b t w c d")
        return cs.sum[w, c](X[b, t + w - 1, c] * W[w, c, d])[b, t, d]

    def strided(X, W):
        t, w = cs.ranks("t=S w=3")
        return cs.sum[w](X[2 * t + w] * W[w])

    check(
        conv,
        """
        cascade conv(X[B,T,C], W[W_1,C,D]) -> out[B,T,D] {
            out[b,t,d] = sum[w,c] X[b,t+w-1,c] * W[w,c,d]
        }
        """,
    )
    check(
        strided,
        """
        cascade strided(X[X0], W[3]) -> out[S] {
            out[t] = sum[w] X[2*t+w] * W[w]
        }
        """,
    )


def test_reversal() -> None:
    def reverse(X):
        t, d = cs.ranks("t d")
        return X[t.extent - 1 - t, d]

    check(
        reverse,
        """
        cascade reverse(X[T,D]) -> out[T,D] {
            out[t,d] = X[T-1-t,d]
        }
        """,
    )


# --- iterative ranks -------------------------------------------------------------------------------------------------


def test_scan() -> None:
    def linear(A, X, H0):
        b, t, d = cs.ranks("b t d")
        H = cs.scan[t](lambda prev: A[b, t, d] * prev + X[b, t, d], init=H0[b, d])
        return H

    check(
        linear,
        """
        cascade linear(A[B,T,D], X[B,T,D], H0[B,D]) -> H[B,T,D] {
            H[b,t,d] = A[b,t,d] * H[b,t-1,d] + X[b,t,d] init H[b,-1,d] = H0[b,d]
        }
        """,
    )


def test_scan_with_an_index_inner_statements_and_two_lags() -> None:
    def recurrent(W, X):
        t, d, e = cs.ranks("t d e")

        def step(prev):
            a = cs.sum[d](prev[t - 1, d] * W[d, e])
            return cs.tanh(a + X[t, e])

        return cs.scan[t](step, init=0, order=(t, e))

    def fibonacci(X):
        t = cs.ranks("t")
        return cs.scan[t](lambda prev: prev[t - 1] + prev[t - 2] * X[t], init=(0, 1), where=t < 9)

    check(
        recurrent,
        """
        cascade recurrent(W[D,D], X[T,D]) -> out[T,D] {
            a[t,e] = sum[d] out[t-1,d] * W[d,e]
            out[t,e] = tanh(a[t,e] + X[t,e]) init out[-1,e] = 0
        }
        """,
    )
    check(
        fibonacci,
        """
        cascade fibonacci(X[T]) -> out[T] {
            out[t] = out[t-1] + out[t-2] * X[t] where t < 9 init out[-1] = 0, out[-2] = 1
        }
        """,
    )


def test_bare_previous_value_in_a_reduction_over_a_foreign_rank_is_refused() -> None:
    def recurrent(W, X):
        t, d, e = cs.ranks("t d e")
        return cs.scan[t](lambda prev: cs.sum[d](prev * W[d, e]) + X[t, e], init=0)

    assert "prev[t - 1, d]" in str(refused(recurrent, "C419", "cs.sum[d](prev * W[d, e])"))


# --- statements and names --------------------------------------------------------------------------------------------


def norm(x, g):
    t, d = cs.ranks("t d")
    return (x[t, d] * cs.rsqrt(cs.mean[d](x[t, d] * x[t, d]) + 1e-6) * g[d])[t, d]


def test_loop_over_layers_unrolls() -> None:
    def layers(x, W):
        t, d, f = cs.ranks("t d f")
        for layer in W:
            h = norm(x, layer["g"])
            h = cs.relu(cs.sum[d](h[t, d] * layer["up"][d, f]))
            x = x[t, d] + cs.sum[f](h * layer["down"][f, d])
        return x

    layer = {"g": (8,), "up": (8, 16), "down": (16, 8)}
    cascade = check(
        layers,
        """
        cascade layers(x[T,D], W_0_g[D], W_0_up[D,F], W_0_down[F,D], W_1_g[D], W_1_up[D,F], W_1_down[F,D]) -> x_2[T,D] {
            h[t,d] = x[t,d] * rsqrt(mean[d] x[t,d] * x[t,d] + 1e-06) * W_0_g[d]
            h_1[t,f] = relu(sum[d] h[t,d] * W_0_up[d,f])
            x_1[t,d] = x[t,d] + sum[f] h_1[t,f] * W_0_down[f,d]
            h_2[t,d] = x_1[t,d] * rsqrt(mean[d] x_1[t,d] * x_1[t,d] + 1e-06) * W_1_g[d]
            h_3[t,f] = relu(sum[d] h_2[t,d] * W_1_up[d,f])
            x_2[t,d] = x_1[t,d] + sum[f] h_3[t,f] * W_1_down[f,d]
        }
        """,
        shapes={"x": (4, 8), "W": [layer, layer]},
    )
    names = [name for name, _ in cs.flatten("W", [{"g": 0, "up": 1, "down": 2}] * 2)]
    assert names == [param.name for param in cascade.params][1:]


def test_what_is_used_twice_has_a_statement_and_what_is_used_once_has_not() -> None:
    def square(x):
        return x * x

    def squares(X):
        i, j = cs.ranks("i j")
        return cs.sum[j](square(X[i, j] + 1)) + cs.sum[j](X[i, j])

    check(
        squares,
        """
        cascade squares(X[I,J]) -> out[I] {
            x[i,j] = X[i,j] + 1
            out[i] = sum[j] x[i,j] * x[i,j] + sum[j] X[i,j]
        }
        """,
    )


def test_reading_at_other_coordinates_makes_a_statement() -> None:
    def shifted(X):
        i, j = cs.ranks("i j")
        return cs.exp(X[i, j])[i + 1, j] - X[i, j]

    check(
        shifted,
        """
        cascade shifted(X[I,J]) -> out[I,J] {
            T[i,j] = exp(X[i,j])
            out[i,j] = T[i+1,j] - X[i,j]
        }
        """,
    )


def test_renaming_ranks_does_not_capture() -> None:
    def swapped(X):
        i, j, k = cs.ranks("i j k")
        return (X[i, j] / cs.sum[j](X[i, j]))[j, k]

    check(
        swapped,
        """
        cascade swapped(X[J,J]) -> out[J,J] {
            out[j,k] = X[j,k] / sum[j_1] X[j,j_1]
        }
        """,
    )


def test_a_reduction_over_the_rank_that_it_is_read_at_is_kept_apart() -> None:
    def totals(X):
        i, j = cs.ranks("i j")
        return cs.sum[j](X[i, j])[j]

    check(
        totals,
        """
        cascade totals(X[J,J]) -> out[J] {
            out[j] = sum[j_1] X[j,j_1]
        }
        """,
    )


def test_a_filter_applies_to_the_expression_as_written() -> None:
    def normalised(x):
        i, n = cs.ranks("i n")
        return x[i, n] / cs.sum[n](x[i, n])

    def filtered(X):
        m, n = cs.ranks("m n")
        live = (X[m, n] / cs.sum[n](X[m, n])).where(n <= m)
        total = cs.sum[n](X[m, n]).where(n <= m)
        # What a helper does over ranks of its own is not filtered by ranks of the caller.
        whole = normalised(X)[m, n].where(n <= m)
        return live, total, whole

    check(
        filtered,
        """
        cascade filtered(X[M,N]) -> live[M,N], total[M], whole[M,N] {
            live[m,n] = X[m,n] / sum[n] X[m,n] where n <= m
            total[m] = sum[n] X[m,n] where n <= m
            whole[m,n] = X[m,n] / sum[n_1] X[m,n_1] where n <= m
        }
        """,
    )


def test_names_that_clash_get_suffixes() -> None:
    def clashing(T, b):
        B, t, max = cs.ranks("b t max")
        exp = T[B, t, max] + b[B]
        E = cs.exp(exp)
        return E * E

    check(
        clashing,
        """
        cascade clashing(T[B,T_1,MAX], b[B]) -> out[B,T_1,MAX] {
            exp_1[b_1,t,max_1] = T[b_1,t,max_1] + b[b_1]
            E[b_1,t,max_1] = exp(exp_1[b_1,t,max_1])
            out[b_1,t,max_1] = E[b_1,t,max_1] * E[b_1,t,max_1]
        }
        """,
    )


def test_returning_parameters_coordinates_and_one_value_twice() -> None:
    def several(X):
        i, j = cs.ranks("i j")
        Y = X[i, j] * 2
        return X[i, j], Y, Y, (i - j)[j, i]

    check(
        several,
        """
        cascade several(X[I,J]) -> out[I,J], Y[I,J], out_1[I,J], out_2[J,I] {
            Y[i,j] = X[i,j] * 2
            out[i,j] = X[i,j]
            out_2[j,i] = i - j
            out_1[i,j] = Y[i,j]
        }
        """,
    )


def test_operators_functions_and_constants() -> None:
    def several(X, c):
        i, j = cs.ranks("i j")
        x = X[i, j]
        A = -x + +x // 2 % 3 - abs(x) ** 2 + 1 / (2 - x)
        B = cs.select((x > 0) | ~(x == c) & (i != j), cs.max(x, -1.5), cs.clamp(x, 0, 1))
        C = cs.cast(cs.default(x.where(i < 3), math.inf), "bf16")
        D = cs.where(x, i >= j) + cs.where(x > 0, x, 0) + cs.any[i](cs.all[j](x > 0)) + cs.argmax[j](x)
        return A, B, C, D

    check(
        several,
        """
        cascade several(X[I,J], c[]) -> A[I,J], B[I,J], C[I,J], D[I,J] {
            A[i,j] = -X[i,j] + X[i,j] // 2 % 3 - pow(abs(X[i,j]), 2) + 1 / (2 - X[i,j])
            B[i,j] = select(X[i,j] > 0 or not X[i,j] == c and i != j, max(X[i,j], -1.5), clamp(X[i,j], 0, 1))
            T[i,j] = X[i,j] where i < 3
            C[i,j] = cast(T[i,j] ?? inf, bf16)
            T_1[i,j] = X[i,j] where i >= j
            D[i,j] = T_1[i,j] + select(X[i,j] > 0, X[i,j], 0) + any[i] all[j] (X[i,j] > 0) + argmax[j] X[i,j]
        }
        """,
    )


def test_numpy_scalars_are_numbers() -> None:
    import numpy

    def scaled(X):
        i = cs.ranks("i")
        return numpy.float32(0.5) * X[i] + numpy.int64(2)

    assert "0.5 * X[i] + 2" in render(cs.trace(scaled))


def test_a_long_chain_is_cut_and_a_deep_one_is_no_recursion() -> None:
    def chain(X):
        i = cs.ranks("i")
        terms = [X[i]]
        for _ in range(1500):
            terms.append(cs.sin(terms[-1]))
        return terms[-1]

    cascade = cs.trace(chain)
    assert 10 < len(cascade.body) < 30
    verify(cascade)
    assert parse_cascade(render(cascade)) == cascade


def test_spans_are_those_of_the_users_file() -> None:
    def spanned(X):
        i, j = cs.ranks("i j")
        return cs.sum[j](X[i, j])

    stmt = cs.trace(spanned).body[0]
    _, first = inspect.getsourcelines(spanned)
    assert stmt.span is not None
    assert (stmt.span.source.name, stmt.span.line, stmt.span.column) == (__file__, first + 2, 16)


# --- cascades as functions -------------------------------------------------------------------------------------------


def test_a_cascade_in_a_traced_function_is_a_call() -> None:
    swiglu, attention = cs.library_callable("swiglu"), cs.library_callable("attention")

    def layer(X, Wg, Wu, Wd, Q, K, V):
        t, d, b, h = cs.ranks("t d b h")
        A = attention(Q, K, V)
        Y = swiglu((X[t, d] * 2)[t, d], Wg, Wu, Wd)
        return A, Y[t, d] + X[t, d] / d.extent

    check(
        layer,
        """
        cascade layer(X[T,D], Wg[D,F], Wu[D,F], Wd[F,D], Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F_1]) -> A[B,H,M,F_1], \
out[T,D] {
            A = attention(Q, K, V)
            T_1[t,d] = X[t,d] * 2
            Y = swiglu(T_1, Wg, Wu, Wd)
            out[t,d] = Y[t,d] + X[t,d] / D
        }
        """,
    )


# --- torch's style ---------------------------------------------------------------------------------------------------


def test_matmul_elementwise_and_broadcasting() -> None:
    def mlp(x, w, bias, w2):
        h = F.gelu(x @ w + bias)
        return x + F.linear(h, w2)

    shapes = {"x": (2, 3, 4), "w": (4, 5), "bias": (5,), "w2": (4, 5)}
    check(
        mlp,
        """
        cascade mlp(x[I,J,K], w[K,L], bias[L], w2[K,L]) -> out[I,J,K] {
            h[i,j,l] = gelu(sum[k] x[i,j,k] * w[k,l] + bias[l])
            out[i,j,k] = x[i,j,k] + sum[l] h[i,j,l] * w2[k,l]
        }
        """,
        shapes=shapes,
    )
    named = cs.trace(mlp, {"x": ("B", "T", "D"), "w": ("D", "F"), "bias": ("F",), "w2": ("D", "F")})
    assert "h[b,t,f] = " in render(named) and "x[B,T,D]" in render(named)


def test_attention_in_torch() -> None:
    def attention(q, k, v, mask):
        s = torch.einsum("bhme,bhne->bhmn", q, k) / q.shape[-1] ** 0.5
        s = s.masked_fill(mask == 0, float("-inf"))
        return torch.softmax(s, -1) @ v

    check(
        attention,
        """
        cascade attention(q[B,H,M,E], k[B,H,N,E], v[B,H,N,I], mask[B,1,1,N]) -> out[B,H,M,I] {
            s[b,h,m,n] = (sum[e] q[b,h,m,e] * k[b,h,n,e]) / pow(E, 0.5)
            s_1[b,h,m,n] = select(mask[b,0,0,n] == 0, -inf, s[b,h,m,n])
            out[b,h,m,i] = sum[n] (softmax[n] s_1[b,h,m,n]) * v[b,h,n,i]
        }
        """,
        shapes={"q": (2, 3, 4, 5), "k": (2, 3, 6, 5), "v": (2, 3, 6, 7), "mask": (2, 1, 1, 6)},
    )


def test_scaled_dot_product_attention_is_plain_maths() -> None:
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    check(
        attention,
        """
        cascade attention(q[I,J,L,M], k[I,J,N,M], v[I,J,N,P]) -> out[I,J,L,P] {
            T[i,j,l,n] = (sum[m] q[i,j,l,m] * k[i,j,n,m]) / sqrt(M) where n <= l
            out[i,j,l,p] = sum[n] (softmax[n] T[i,j,l,n]) * v[i,j,n,p]
        }
        """,
        shapes={"q": (2, 3, 4, 5), "k": (2, 3, 6, 5), "v": (2, 3, 6, 7)},
    )


def test_a_tensor_used_twice_has_two_ranks_over_one_shape() -> None:
    def gram(x):
        return x @ x.T

    def outer(x):
        return x[:, None] * x[None, :] - x[..., None]

    check(
        gram,
        """
        cascade gram(x[I,J]) -> out[I,I] {
            out[i,i_1] = sum[j] x[i,j] * x[i_1,j]
        }
        """,
        shapes={"x": (3, 4)},
    )
    check(
        outer,
        """
        cascade outer(x[I]) -> out[I,I] {
            out[i,i_1] = x[i] * x[i_1] - x[i]
        }
        """,
        shapes={"x": (3,)},
    )


TORCH_FORMS: dict[str, Callable[[Any], Any]] = {
    "norms": lambda x: F.layer_norm(x, (4,)) + F.rms_norm(x, x.shape[-1:], None, 1e-6),
    "norm with gain": lambda x: F.layer_norm(x, (4,), x[0, 0], x[0, 1], 1e-3) * F.rms_norm(x, (4,), x[1, 1], 1e-4),
    "activations": lambda x: F.silu(x) + torch.relu(x) * torch.sigmoid(x).tanh() - F.gelu(x, approximate="tanh"),
    "softplus": lambda x: F.softplus(x) + F.leaky_relu(x) + F.dropout(x, training=False),
    "softmaxes": lambda x: x.softmax(1) + torch.log_softmax(x, dim=-1) + F.softmax(x, dim=0),
    "reductions": lambda x: x.sum(-1) + x.mean((0, 2))[None] * torch.amax(x, 2) - x.amin(dim=-1),
    "kept": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1) * x.logsumexp(0, keepdim=True),
    "all": lambda x: x.sum() + x.max() - torch.min(x) + x.prod(),
    "variance": lambda x: (
        x.var(-1) + torch.var(x, -1, unbiased=False) + torch.var(x, dim=(1, 2), correction=0)[:, None]
    ),
    "arithmetic": lambda x: 2 - x / 3 + x**2 - (1 / (x.abs() + 1)) + torch.add(x, x, alpha=2) - 2**x,
    "functions": lambda x: x.exp().log() + x.square().sqrt() + (x * x + 1).rsqrt() + x.clamp(-1, 0.5) + x.ceil(),
    "choices": lambda x: torch.where(x > 0, x, -x) + x.where(x < 0, x * 2) + torch.maximum(x, x * 2),
    "predicates": lambda x: torch.where((x > 0) & ~(x > 1) | torch.logical_not(x < -1), x, 0.0),
    "views": lambda x: x.transpose(1, 2).permute(2, 0, 1).unsqueeze(1).squeeze(1).permute(1, 0, 2) + x.mT.mT,
    "items": lambda x: x[0] + x[:, 1, None][:, 0, :][0] + x[-1] + x[..., 2][0, :, None],
    "triangles": lambda x: x.tril() + torch.triu(x, diagonal=1),
    "running": lambda x: torch.cumsum(x, 1) + x.cumprod(dim=-1),
    "split": lambda x: x.view(2, 3, 2, -1).transpose(1, 2) * 2,
    "merge": lambda x: (x * 2).transpose(1, 2).reshape(2, x.shape[1] * 4),
    "repeated": lambda x: x.repeat_interleave(2, dim=1) * 2,
    "products": lambda x: torch.bmm(x, x.transpose(1, 2)) @ x + torch.matmul(x, x[0, 0])[..., None],
    "contraction": lambda x: torch.einsum("abc,abd->cd", x, x) + torch.einsum("ij,ij", x[0], x[1]),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "masked": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.mT > -1)),
    "types": lambda x: x.float().to(torch.float64) + x.half().double().contiguous(),
    "extents": lambda x: x * x.shape[-1] + x.size(0) - x.dim() + x.shape[0] * x.shape[1],
}


@pytest.mark.parametrize("name", TORCH_FORMS)
def test_torch_forms_mean_what_torch_means(name: str) -> None:
    function = TORCH_FORMS[name]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
    cascade = cs.trace(function, {"x": x})
    verify(cascade)
    assert parse_cascade(render(cascade)) == cascade
    found = run(cascade, {"x": x})[cascade.results[0].name]
    expected = function(x)
    assert found.shape == expected.shape
    # A half-precision rounding and torch's float32 tanh of gelu_tanh aside, both compute in float64.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-9, atol=1e-9)


def test_embedding() -> None:
    def embed(ids, table, position):
        return F.embedding(ids, table) + position[None, :]

    check(
        embed,
        """
        cascade embed(ids[I,J], table[Table0,K], position[J,K]) -> out[I,J,K] {
            out[i,j,k] = table[ids[i,j],k] + position[j,k]
        }
        """,
        shapes={"ids": (2, 4), "table": (100, 16), "position": (4, 16)},
    )


def test_both_styles_meet_by_indexing_and_by_order() -> None:
    def project(x, w, v):
        t, f, g = cs.ranks("t f g")
        Y = (cs.softmax[f]((x @ w)[t, f]))[t, f] @ v
        return Y

    check(
        project,
        """
        cascade project(x[T,I], w[I,F], v[F,J]) -> Y[T,J] {
            Y[t,j] = sum[f] (softmax[f] sum[i] x[t,i] * w[i,f]) * v[f,j]
        }
        """,
        shapes={"x": (2, 3), "w": (3, 4), "v": (4, 5)},
    )


def test_declared_types() -> None:
    def typed(x):
        i = cs.ranks("i")
        return x[i] * 2

    cascade = cs.trace(typed, dtypes={"x": torch.bfloat16})
    assert cascade.params[0].dtype is DType.BF16
    assert "x: bf16[I]" in render(cascade)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_python_control_flow_on_values() -> None:
    def branching(x):
        i = cs.ranks("i")
        if x[i] > 0:
            return x[i]
        return -x[i]

    def chained(x):
        i, j = cs.ranks("i j")
        return x[i, j].where(0 <= i < j)

    def looping(x):
        return list(x)

    def rooting(x):
        return x / math.sqrt(x.shape[-1])

    def storing(x):
        i = cs.ranks("i")
        x[i] = 0
        return x[i]

    refused(branching, "C401", "x[i] > 0")
    refused(chained, "C401", "0 <= i < j")
    assert "shapes=" in str(refused(looping, "C402", "list(x)"))
    refused(rooting, "C402", "math.sqrt(x.shape[-1])", shapes={"x": ("T",)})
    refused(storing, "C403", "x[i] = 0".removesuffix(" = 0"))


def test_index_mistakes() -> None:
    def ragged(x, y):
        i, j = cs.ranks("i j")
        return x[i, j] + y[i] * x[i]

    def sliced(x):
        i = cs.ranks("i")
        return x[i, :]

    def miscounted(x):
        i, j = cs.ranks("i j")
        return (x[i, j] * 2)[i]

    error = refused(ragged, "C404", "x[i]")
    assert error.diagnostics[0].notes
    refused(sliced, "C404", "x[i, :]")
    refused(miscounted, "C404", "(x[i, j] * 2)[i]")


def test_rank_mistakes() -> None:
    def misnamed(x):
        i = cs.ranks("i 2j")
        return x[i]

    def unnamed(x):
        return cs.sum(x)

    def summed(x, y):
        i, j = cs.ranks("i j")
        return cs.sum[j](x[i]) + y[j]

    def conflicting(x, y):
        i, j = cs.ranks("i=4 j=5")
        return x[i] * y[i] + cs.sum[j](x[j])

    refused(misnamed, "C406", 'cs.ranks("i 2j")')
    refused(unnamed, "C407", "cs.sum(x)")
    refused(summed, "C414", "cs.sum[j](x[i])")
    assert refused(conflicting, "C416", 'cs.ranks("i=4 j=5")').diagnostics[0].notes


def test_operand_mistakes() -> None:
    weight = torch.ones(4, 4)

    def captured(x):
        i, j = cs.ranks("i j")
        return x[i, j] * weight

    def captured_first(x):
        return weight @ x

    def named(x):
        i = cs.ranks("i")
        return x[i] + "1"

    def filled(x):
        i = cs.ranks("i")
        return x[i].fill(1) + 1

    def rounded(x):
        i = cs.ranks("i")
        return cs.cast(x[i], "bf17")

    refused(captured, "C409", "x[i, j] * weight")
    refused(captured_first, "C409", "weight @ x", shapes={"x": (4, 4)})
    refused(named, "C409", 'x[i] + "1"')
    refused(filled, "C408", "x[i].fill(1) + 1")
    refused(rounded, "C413", 'cs.cast(x[i], "bf17")')


def test_values_of_another_trace() -> None:
    kept = []

    def first(x):
        i = cs.ranks("i")
        kept.append(x[i] * 2)
        return kept[0]

    def second(y):
        i = cs.ranks("i")
        return y[i] + kept[0]

    cs.trace(first)
    refused(second, "C405", "y[i] + kept[0]")


def test_function_mistakes() -> None:
    def starred(*tensors):
        return tensors

    def nothing(x):
        i = cs.ranks("i")
        x[i] + 1

    def unused(x, y):
        i = cs.ranks("i")
        return x[i]

    refused(starred, "C417", "tensors")
    refused(nothing, "C418", "nothing")
    refused(unused, "C424", "y")


def test_whole_tensors_need_shapes() -> None:
    def product(x, w):
        return x @ w

    def mixed(x, w):
        i, j = cs.ranks("i j")
        return (x[i, j] * 2) @ w

    def kept(x):
        return x.mean(-1, keepdim=True)

    error = refused(product, "C410", "x @ w")
    assert "shapes" in (error.diagnostics[0].help or "")
    refused(mixed, "C411", "(x[i, j] * 2) @ w", shapes={"x": (2, 3), "w": (3, 4)})
    refused(product, "C412", "x @ w", shapes={"x": (2, 3), "w": (4, 5)})
    refused(kept, "C423", "x.mean(-1, keepdim=True)", shapes={"x": (2, 3)})


def test_extents_that_nothing_shows_are_stated() -> None:
    def heads(x, w):
        q = (x @ w).view(2, 3, 2, 4)
        return torch.einsum("bmhe,bnhe->bhmn", q, q)

    def counted(x):
        i, k = cs.ranks("i k=4")
        return x[i] * cs.sum[k](k)

    x, w = torch.randn(2, 3, 8).double(), torch.randn(8, 8).double()
    wanted = heads(x, w)
    made = cs.trace(heads, {"x": (2, 3, 8), "w": (8, 8)})
    verify(made)
    assert made.given and parse_cascade(render(made)) == made
    found = run(made, {"x": x, "w": w})
    torch.testing.assert_close(next(iter(found.values())), wanted)
    assert [(given.rank, given.size) for given in cs.trace(counted).given] == [("k", 4)]


def test_torch_functions_without_a_form() -> None:
    def joined(x):
        return torch.cat([x, x])

    def unknown(x):
        return torch.special.bessel_j0(x)

    def misspelled(x):
        return x.sofmax(-1)

    def stored(x):
        x.add_(1)
        return x

    def cut(x):
        return x[:, 1:]

    def flat(x):
        return torch.softmax(x, 0)

    def unsized(x):
        return F.rms_norm(x, (3,))

    def far(x):
        return x.sum(2)

    def dropped(x):
        return F.dropout(x, 0.5)

    shapes = {"x": (2, 3)}
    assert "not joined" in str(refused(joined, "C421", "torch.cat([x, x])", shapes=shapes))
    assert "bessel" in str(refused(unknown, "C421", "torch.special.bessel_j0(x)", shapes=shapes))
    assert "softmax" in str(refused(misspelled, "C421", "x.sofmax", shapes=shapes))
    assert "x = x.add(...)" in str(refused(stored, "C421", "x.add_", shapes=shapes))
    refused(cut, "C427", "x[:, 1:]", shapes=shapes)
    refused(dropped, "C421", "F.dropout(x, 0.5)", shapes=shapes)
    refused(flat, "C422", "torch.softmax(x, 0)", shapes={"x": (1, 3)})
    refused(unsized, "C427", "F.rms_norm(x, (3,))", shapes=shapes)
    refused(far, "C427", "x.sum(2)", shapes=shapes)


def test_columns_are_characters() -> None:
    def accented(x):
        i = cs.ranks("i")
        return (é := "ü") and x[i] + é

    refused(accented, "C409", "x[i] + é")


def test_an_extent_that_python_asks_for_is_fixed() -> None:
    def scaled(q, k):
        return q @ k.mT / math.sqrt(q.shape[-1]) + len(range(q.shape[0]))

    made = cs.trace(scaled, {"q": (5, 16), "k": (7, 16)})
    assert [param.shape for param in made.params] == [(5, 16), ("I", 16)]
    assert "/ 4.0" in render(made)
    compiled = compile_(scaled)
    for rows, width in ((5, 16), (6, 16), (5, 4)):
        q, k = torch.randn(rows, width), torch.randn(7, width)
        torch.testing.assert_close(compiled(q, k), scaled(q, k))


def test_the_library_is_at_hand_in_python() -> None:
    def block(X, g):
        t, d = cs.ranks("t d")
        N = cascade.rmsnorm[d](X[t, d], g[d])
        Y = cascade.softcap(N, 2.0)
        return Y[t, d]

    x = torch.randn(3, 8)
    wanted = 2 * torch.tanh(F.rms_norm(x, (8,), None, 1e-6) / 2)
    torch.testing.assert_close(compile_(block)(x, torch.ones(8)), wanted)
    assert not hasattr(cascade, "rmsnrm")


def test_a_compiled_cascade_is_a_function_in_another() -> None:
    product = cascade.parse("cascade mm(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = A[m,k] * B[k,n] }")

    def layer(X, W):
        t, f = cs.ranks("t f")
        Y = product(X, W)
        return cs.relu(Y[t, f])[t, f]

    x, w = torch.randn(3, 4), torch.randn(4, 5)
    torch.testing.assert_close(compile_(layer)(x, w), (x @ w).relu())
