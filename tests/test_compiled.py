"""What `compile` and `parse` return: how it is called, what it refuses and with which words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy
import pytest
import torch

import cascade as cs
from cascade.compiled import Compiled, specialise
from cascade.errors import CallError, CommandError, ParseError, VerifyError
from cascade.ir import DType
from cascade.text import render

TEXT = """cascade scores(Q: f32[M,E], K[N,E], scale: f32[]) -> S[M,N], R[M] fill -inf {
    S[m,n] = Q[m,e] * K[n,e] * scale where n <= m
    R[m] = max[n] S[m,n]
}
"""
Q, K = torch.randn(3, 4), torch.randn(5, 4)


@cs.compile
def matmul(A, B):
    m, n, k = cs.ranks("m n k")
    return cs.sum[k](A[m, k] * B[k, n])[m, n]


# --- what is compiled ------------------------------------------------------------------------------------------------


def test_text_path_and_cascade_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "scores.cascade"
    path.write_text(
        "cascade other(X[N]) -> Y[N] { Y[n] = X[n] }\n" + TEXT + "cascade last(X[N]) -> Y[N] { Y[n] = X[n] }\n"
    )
    expected = cs.parse(TEXT).cascade
    assert cs.compile(TEXT).cascade == expected
    assert cs.compile(path, "scores").cascade == expected
    assert cs.compile(f"{path}:scores").cascade == expected
    assert cs.compile(expected).cascade is expected
    assert cs.compile(str(path)).cascade.name == "last"


def test_decorator_with_and_without_parentheses() -> None:
    def double(X):
        """Twice."""
        n = cs.ranks("n")
        return (2 * X[n])[n]

    for compiled in (cs.compile(double), cs.compile()(double), cs.compile(without=["canonicalize"])(double)):
        assert isinstance(compiled, Compiled)
        assert compiled.__name__ == "double" and compiled.__doc__ == "Twice."
        assert torch.equal(compiled(K[0]), 2 * K[0])


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("cascade broken( {", ParseError, "C1"),
        ("cascade c(X[N]) -> Y[N] { Y[n] = Z[n] }", VerifyError, "C2"),
        ("nowhere.cascade", CommandError, r"C610\]: cannot read nowhere.cascade: No such file or directory"),
        (3, CallError, "C330"),
    ],
)
def test_what_cannot_be_compiled(source: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cs.compile(source)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "attention.cascade").write_text(TEXT)
    with pytest.raises(CommandError, match=r"did you mean '.*attention.cascade'"):
        cs.compile(tmp_path / "atention.cascade")


def test_file_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.cascade"
    path.write_bytes(b"cascade c(X[N]) -> Y[N] {\n  # caf\xe9\n Y[n] = X[n] }\n")
    with pytest.raises(ParseError, match=r"latin.cascade:2:8: error\[C101\]: byte 0xE9 at offset 33 is not UTF-8"):
        cs.compile(path)


# --- calling ---------------------------------------------------------------------------------------------------------


def test_tensors_by_position_and_by_name() -> None:
    scores = cs.parse(TEXT)
    first, second = scores(Q, K, torch.tensor(0.5))
    for found in (scores(Q, scale=torch.tensor(0.5), K=K), scores(scale=0.5, K=K, Q=Q), scores(Q, K, 0.5, M=3)):
        assert torch.equal(found[0], first) and torch.equal(found[1], second)


def test_one_result_is_a_tensor() -> None:
    assert isinstance(matmul(Q, K.T), torch.Tensor)
    torch.testing.assert_close(matmul(B=K.T, A=Q), Q @ K.T)


def test_sizes_of_free_symbols_by_keyword() -> None:
    ones = cs.parse("cascade table(X[N]) -> Y[M,N] { Y[m,n] = X[n] * m }")
    torch.testing.assert_close(ones(K[0], M=3), K[0] * torch.arange(3)[:, None])
    with pytest.raises(CallError, match="C323"):
        ones(K[0])


def test_pipeline_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = cs.parse(TEXT)
    scores(Q, K, 1.0)
    monkeypatch.setattr("cascade.compiled.run_pipeline", lambda *_, **__: pytest.fail("ran again"))
    scores(Q[:2], K, 1.0)
    assert scores.trace is scores.trace


def test_result_keeps_the_device_and_type() -> None:
    assert matmul(Q.bfloat16(), K.T.bfloat16()).dtype is torch.bfloat16


def test_explain_names_the_passes() -> None:
    text = cs.parse(TEXT).explain()
    assert text.startswith("scores: passes over its ranks\n")
    assert "\ncascade scores: 2 statements\n  inline: nothing to do\n  canonicalize: " in text
    assert render(cs.parse(TEXT).trace.final) in text


def test_a_folded_rank_without_an_element() -> None:
    """A sum over nothing is 0, also where a fold would read it out of a state as 0/0."""
    mean_of = cs.parse("cascade c(X[M,N], V[N,F]) -> O[M,F] { O[m,f] = sum[n] (softmax[n] X[m,n]) * V[n,f] }")
    assert "fold n" in str(mean_of.trace.final)
    assert mean_of(torch.ones(2, 0), torch.ones(0, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert mean_of(torch.ones(2, 5), torch.ones(5, 3)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_repr_shows_the_declaration() -> None:
    assert repr(cs.parse(TEXT)) == "<cascade.Compiled scores(Q: f32[M,E], K[N,E], scale: f32[])>"
    assert repr(matmul) == "<cascade.Compiled matmul(A, B)>"


def test_str_of_the_cascade_is_its_text() -> None:
    assert str(cs.parse(TEXT).cascade).startswith("cascade scores(Q: f32[M,E], K[N,E], scale: f32[]) -> ")


def test_a_pass_can_be_left_out() -> None:
    text = "cascade c(X[B,N]) -> Y[B,N] { Y[b,n] = softmax[n] 2.0 * X[b,n] }"
    plain = cs.compile(text, without=["inline"])
    assert "softmax[n]" in render(plain.trace.final)
    torch.testing.assert_close(plain(Q), torch.softmax(2 * Q, 1))


# --- Python functions ------------------------------------------------------------------------------------------------


def test_plain_parameters_are_python_values() -> None:
    @cs.compile
    def scaled(X, factor=2.0, *, negate=False):
        n = cs.ranks("n")
        return (X[n] * (-factor if negate else factor))[n]

    x = K[0]
    assert torch.equal(scaled(x), 2 * x)
    assert torch.equal(scaled(x, 3.0), 3 * x)
    assert torch.equal(scaled(x, negate=True), -2 * x)
    assert torch.equal(scaled(x), 2 * x)


def test_lists_of_tensors() -> None:
    @cs.compile
    def chain(X, weights):
        for W in weights:
            X = X @ W
        return X

    weights = [torch.randn(4, 4), torch.randn(4, 2)]
    torch.testing.assert_close(chain(Q, weights), Q @ weights[0] @ weights[1])
    torch.testing.assert_close(chain(Q, weights[:1]), Q @ weights[0])


MASKS = {  # what a mask of padded keys, of pairs or an additive one looks like, and how a function hands it on
    "padding": (lambda keep: keep[:, None, None, :], torch.arange(7) < torch.tensor([[7], [4]])),
    "not padding": (lambda drop: ~drop[:, None, None, :], torch.arange(7) >= torch.tensor([[7], [4]])),
    "pairs": (lambda see: see, torch.ones(5, 7).tril().bool()),
    "broadcast": (lambda see: see, torch.ones(1, 1, 5, 7).tril().bool()),
    "additive": (lambda bias: bias, torch.randn(2, 5, 7)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_torch_is_what_its_type_says(name: str) -> None:
    """Cut in torch's way, without a word about shapes or types: the first call tells both."""
    turned, mask = MASKS[name]
    q, k, v = (torch.randn(2, 2, length, 8) for length in (5, 7, 7))

    def attend(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=turned(mask))

    compiled = cs.compile(attend)
    torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask))
    filters = [stmt for stmt in compiled.cascade.body if getattr(stmt, "where", None) is not None]
    assert bool(filters) == (mask.dtype is torch.bool)


def test_masks_of_two_types_in_turn() -> None:
    q, k, v = (torch.randn(2, 2, length, 8) for length in (5, 7, 7))

    @cs.compile
    def attend(q, k, v, masks):
        found = [torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in masks]
        return found[0] + found[1]

    see, bias = torch.ones(5, 7).tril().bool(), torch.randn(5, 7)
    for masks in ([see, bias], [bias, see], [see, see], [see, bias]):
        wanted = attend.__wrapped__(q, k, v, masks)
        torch.testing.assert_close(attend(q, k, v, masks), wanted)


def test_torch_style_follows_the_shape() -> None:
    @cs.compile
    def normalise(X):
        return torch.softmax(X, -1)

    for shape in ((4,), (3, 4), (2, 3, 4), (1, 4), (3, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(normalise(x), torch.softmax(x, -1))


def test_optional_tensor() -> None:
    @cs.compile
    def linear(X, bias=None):
        t, d = cs.ranks("t d")
        return (X[t, d] + bias[d])[t, d] if bias is not None else (2 * X[t, d])[t, d]

    bias = torch.randn(4)
    assert torch.equal(linear(Q), 2 * Q)
    assert torch.equal(linear(Q, bias), Q + bias)
    assert torch.equal(linear(Q, bias=bias[:1].expand(4)), Q + bias[0])


def test_compiled_functions_compose() -> None:
    norm = cs.parse("cascade norm(X[T,D]) -> Y[T,D] { Y[t,d] = X[t,d] * rsqrt(mean[d] X[t,d] * X[t,d]) }")

    @cs.compile
    def layer(X, W):
        return matmul(norm(X), W)

    found = layer(Q, K.T)
    torch.testing.assert_close(found, (Q * Q.square().mean(1, True).rsqrt()) @ K.T)
    assert "norm(" in str(layer.cascade) and "matmul(" in str(layer.cascade)


def test_torch_style_functions_compose() -> None:
    @cs.compile
    def normalise(X):
        return torch.softmax(X, -1)

    @cs.compile
    def twice(X):
        return normalise(normalise(X))

    torch.testing.assert_close(twice(Q), torch.softmax(torch.softmax(Q, -1), -1))


# --- what a call refuses ---------------------------------------------------------------------------------------------


SCORES = r"scores\(Q: f32\[M,E\], K\[N,E\], scale: f32\[\]\)"


@pytest.mark.parametrize(
    ("tensors", "named", "code", "says"),
    [
        ((Q, K, 1.0, Q), {}, "C331", f"{SCORES} takes 3 tensors, 4 were given by position"),
        ((Q, K, 1.0), {"N_": 4}, "C332", "scores has no tensor and no shape symbol 'N_'\nhelp: did you mean 'N'"),
        ((Q, K, 1.0), {"Q": Q}, "C333", "'Q' is given by position and by name"),
        ((Q,), {}, "C334", f"{SCORES} needs K, scale"),
        ((Q, K.numpy(), 1.0), {}, "C335", r"K\[N,E\] is given a numpy.ndarray, not a tensor(?s:.*)torch.from_numpy"),
        ((Q, [1.0], 1.0), {}, "C335", r"K\[N,E\] is given a list, not a tensor(?s:.*)torch.tensor"),
        ((Q, K, None), {}, "C335", r"scale: f32\[\] is given a NoneType, not a tensor"),
        ((Q, K.to(torch.complex64), 1.0), {}, "C336", r"K\[N,E\] is given a torch.complex64 tensor"),
        ((Q, K.to_sparse(), 1.0), {}, "C336", r"K\[N,E\] is given a tensor of layout torch.sparse_coo(?s:.*)to_dense"),
        ((Q.double(), K, 1.0), {}, "C337", r"'Q' is declared f32, the tensor given is f64(?s:.*)Q.to\(torch.float32\)"),
        ((Q[0], K, 1.0), {}, "C320", "'Q' has 1 rank, declared with 2"),
        ((Q, K[:, :2], 1.0), {}, "C321", "'E' is 4 in 'Q' and 2 in 'K'"),
        ((Q, K, 1.0), {"M": 7}, "C321", "'M' is 7 by keyword and 3 in 'Q'"),
        ((Q, K, 1.0), {"M": "three"}, "C324", "the size of 'M' is three"),
        ((Q, K.to("meta"), 1.0), {}, "C338", r"'K' is on meta, 'Q' is on cpu(?s:.*)K.to\('cpu'\)"),
        (
            (Q, K.clone().requires_grad_(), 1.0),
            {},
            "C339",
            r"'K' requires a gradient(?s:.*)torch.no_grad\(\).*K.detach\(\)",
        ),
    ],
)
def test_call_refuses(tensors: tuple[object, ...], named: dict[str, object], code: str, says: str) -> None:
    with pytest.raises(CallError, match=says) as caught:
        cs.parse(TEXT)(*tensors, **named)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.diagnostics[0].help


def test_declared_extent_is_checked() -> None:
    fixed = cs.parse("cascade f(X[64]) -> Y[64] { Y[n] = X[n] }")
    with pytest.raises(CallError, match=r"<text>:1:13: error\[C322\]: rank 1 of 'X' has extent 65, declared 64"):
        fixed(torch.randn(65))


def test_python_function_refuses_in_its_own_words() -> None:
    with pytest.raises(CallError, match=r"C334\]: matmul\(A, B\) needs B"):
        matmul(Q)
    with pytest.raises(CallError, match=r"C335\]: 'B' is given a list that holds a float, not tensors"):
        matmul(Q, [1.0])
    with pytest.raises(CallError, match=r"C332\]: matmul has no tensor and no shape symbol 'C'"):
        matmul(Q, K.T, C=3)


def test_gradients_are_refused_in_grad_mode_only() -> None:
    wanted = K.T.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(matmul(Q, wanted), Q @ wanted)
    torch.testing.assert_close(matmul(Q, wanted.detach()), (Q @ wanted).detach())


def test_option_must_be_hashable() -> None:
    @cs.compile
    def f(X, option=None):
        n = cs.ranks("n")
        return (2 * X[n])[n]

    with pytest.raises(CallError, match=r"C340\]: a set cannot be an option"):
        f(Q[0], option={1})


def test_inputs_are_not_written() -> None:
    q, k = Q.clone(), K.clone()
    cs.parse(TEXT)(q, k, 1.0)
    assert torch.equal(q, Q) and torch.equal(k, K)


def test_numpy_sizes_are_taken() -> None:
    table = cs.parse("cascade table(X[N]) -> Y[M,N] { Y[m,n] = X[n] where m < M }")
    assert table(K[0], M=numpy.int64(3)).shape == (3, 4)


# --- specialising ----------------------------------------------------------------------------------------------------


def test_specialise_puts_numbers_for_symbols() -> None:
    source = cs.parse(
        "cascade c(X[B,N], Y: f16[N]) -> G[B,J], I[B,J] { G[b,j], I[b,j] = topk[n, J] X[b,n] / sqrt(N) * Y[n] }"
    ).cascade
    found = render(specialise(source, {"N": 8, "J": 2}, DType.BF16))
    assert found.startswith("cascade c(X: bf16[B,8], Y: f16[8]) -> G[B,2], I[B,2] {")
    assert re.search(r"topk\[n, 2\] X\[b,n\] / sqrt\(8\)", found)
    assert specialise(source, {}) == dataclasses.replace(source)
