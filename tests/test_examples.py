"""Every example runs and checks its own claim; MiniLM against the stock encoder on the same published weights."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "examples").glob("[0-9][0-9]_*.py"))
minilm = importlib.import_module("examples.06_minilm")


@pytest.mark.parametrize("name", PROGRAMS)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    importlib.import_module(f"examples.{name}").main()


def sentences() -> list[str]:
    """50 sentences of 1 to 60 words, seeded."""
    rng = random.Random(0)
    text = "the a compiler kernel matrix runs fast slowly dog river quantum of in over music stock green seven"
    words = text.split()
    lengths = [1, 1, 2, 60, *(rng.randint(1, 40) for _ in range(46))]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]


def stock_embeddings(ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Mean-pooled, normalised embeddings of transformers' BertModel."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = minilm.model_folder()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False).eval()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name]
    mask = torch.arange(ids.shape[1])[None] < length[:, None]
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.campaign
def test_minilm_gives_the_embeddings_of_the_stock_encoder() -> None:
    ids, length = minilm.tokenize(sentences())
    assert len(ids) == 50 and int(length.min()) <= 3
    found = minilm.MiniLM.load()(ids, length)
    wanted = stock_embeddings(ids, length)
    distance = 1 - (found.double() * wanted.double()).sum(-1) / (
        found.double().norm(dim=-1) * wanted.double().norm(dim=-1)
    )
    assert float(distance.max()) < 1e-6


def test_minilm_handles_one_token_and_wholly_padded_rows() -> None:
    ids, length = minilm.tokenize(["one sentence of some words", "x"])
    ids = torch.cat([ids, ids[:1]])
    length = torch.tensor([int(length[0]), 1, 0])
    found = minilm.MiniLM.load()(ids, length)
    assert torch.equal(found[2], torch.zeros(384))
    assert bool(found.isfinite().all())
    wanted = stock_embeddings(ids[:2], length[:2])
    assert torch.allclose(found[:2], wanted, atol=1e-5)
