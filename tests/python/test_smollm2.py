"""A pretrained model through the cache: what refit is worth against KVarN as published."""

import numpy as np
import pytest
from kvarn.eval import Divergence, dense_arm, divergence, kvarn_arm
from smollm2 import smollm2

pytestmark = pytest.mark.model

TOKENS = 2048
TEXTS = 2
# Largest KL of refit over KL as published, both against the dense cache.
LIMITS = {"kvarn_k4v2_g128": 0.70, "kvarn_k2v2_g128": 0.55}


def _english(texts: int, tokens: int) -> list[list[int]]:
    """Consecutive pieces of the prose that every Python installation carries."""
    from pydoc_data.topics import topics

    ids = smollm2().tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    return [ids[i * tokens : (i + 1) * tokens] for i in range(texts)]


@pytest.fixture(scope="module")
def figures() -> dict[tuple[str, bool], Divergence]:
    """Per preset and refit, all texts joined. Blocks are sealed before the next one reads them (hold=0)."""
    keys = [(preset, refit) for preset in LIMITS for refit in (False, True)]
    arms = [kvarn_arm(preset, refit=refit, hold=0) for preset, refit in keys]
    texts = [divergence(smollm2().model, ids, dense_arm("fp32"), arms) for ids in _english(TEXTS, TOKENS)]
    joined = {}
    for key, parts in zip(keys, zip(*texts, strict=True), strict=True):
        columns = ("kl", "agree", "nll", "nll_reference")
        joined[key] = Divergence(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in columns)
        )
    return joined


@pytest.mark.parametrize("preset", LIMITS)
def test_refit_lowers_the_divergence(
    figures: dict[tuple[str, bool], Divergence], preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published, refit = figures[preset, False], figures[preset, True]
    ratio = float(refit.kl.mean() / published.kl.mean())
    with capsys.disabled():
        print(f"\n{preset}, {TEXTS} × {TOKENS} tokens: KL ratio {ratio:.3f}, limit {LIMITS[preset]}")
        for name, found in (("refit", refit), ("published", published)):
            print(
                f"  {name:9}: KL {found.kl.mean():.4f}, same top token {found.agree.mean():.3f}, "
                f"NLL {found.nll.mean():.3f} (dense {found.nll_reference.mean():.3f})"
            )
    assert published.kl.mean() > 0
    assert ratio <= LIMITS[preset]


def test_the_prose_is_english_to_the_model(figures: dict[tuple[str, bool], Divergence]) -> None:
    """Guards against a broken tokenizer or weights, with which the ratios would mean nothing."""
    assert float(figures["kvarn_k4v2_g128", True].nll_reference.mean()) < 3.0
