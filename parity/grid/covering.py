"""Cases beyond the twelve: every pair of choices of the family stands in one of them at least.

A case takes a level of each factor. Which ones stands in `_ROWS`, which `cover` made, a greedy program without chance:
`python -m parity.grid.covering` prints them anew. What no model has (`_NEVER`) is left out by it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any, NamedTuple

from gpt_core.config import ModelConfig

FACTORS: dict[str, tuple[str, ...]] = {
    "mask": ("full", "window", "LG", "LGN"),
    "bias": ("all biases", "no bias", "q, k, v biases alone", "no q, k, v biases", "no MLP biases"),
    "placement": ("pre", "post", "sandwich", "parallel"),
    "scaling": ("unscaled", "linear", "llama3", "yarn"),
    "heads": ("mha", "gqa", "mqa"),
    "activation": ("tanh GELU", "erf GELU", "SiLU"),
    "qk_norm": ("no qk-norm", "qk-norm of heads", "qk-norm of the whole"),
    "scales": ("no scales", "scaled embedding", "four scales"),
    "position": ("learned", "rope"),
    "local_theta": ("one theta", "two thetas"),
    "rotated": ("whole heads turn", "parts of heads turn"),
    "norm": ("LayerNorm", "RMSNorm"),
    "offset": ("scale", "1 + scale"),
    "gate": ("no gate", "gate"),
    "softcap": ("no softcap", "softcap"),
    "logit_softcap": ("logits uncapped", "logits capped"),
    "tied": ("tied", "untied"),
    "vocabulary": ("padded", "unpadded"),
    "head_dim": ("head of 8", "head of 12"),
    "blocks": ("scanned", "unrolled"),
}
"""Every choice and its levels."""

_NEVER = {
    ("learned", other)
    for other in ("LGN", "linear", "llama3", "yarn", "two thetas", "parts of heads turn")  # which are of rotation
} | {("two thetas", mask) for mask in ("full", "window")}

_CHOICES: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned"},
    "rope": {"position": "rope", "rope_theta": 100.0},
    "mha": {"n_kv_heads": 6},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "LG": {"attention_pattern": "LG", "n_layers": 3},  # a cycle and a rest
    "LGN": {"attention_pattern": "LGN", "n_layers": 3},
    "two thetas": {"rope_local_theta": 9.0},
    "LayerNorm": {"norm": "layer", "norm_eps": 1e-4},  # another eps is seen in fp32
    "RMSNorm": {"norm": "rms", "norm_eps": 2e-3},  # and a wrong place of it
    "1 + scale": {"norm_unit_offset": True},
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "parallel": {"parallel_residual": True},
    "erf GELU": {"activation": "gelu"},
    "SiLU": {"activation": "silu"},
    "gate": {"gated_mlp": True},
    "no bias": {"bias": False, "qkv_bias": False, "mlp_bias": False},
    "q, k, v biases alone": {"bias": False, "qkv_bias": True, "mlp_bias": False},
    "no q, k, v biases": {"qkv_bias": False},
    "no MLP biases": {"mlp_bias": False},
    "qk-norm of heads": {"qk_norm": "head"},
    "qk-norm of the whole": {"qk_norm": "whole"},
    "softcap": {"attention_softcap": 2.0},
    "logits capped": {"logit_softcap": 4.0},
    "scaled embedding": {"embedding_scale": math.sqrt(48)},
    "four scales": {"embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.25, "attention_scale": 0.2},
    "untied": {"tied_embeddings": False},
    "padded": {"pad_vocab_size_multiple": 256},
    "unpadded": {"pad_vocab_size_multiple": 1},
    "head of 12": {"head_dim": 12},
}
"""Fields that a level sets."""

# Positions go to 36 and pairs turn by 1 to 1 / 100: with this original context two pairs of each head or more lie on
# the ramp between those that are kept and those that are slowed, of however many dimensions.
_SCALING: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3": {"kind": "llama3", "factor": 4.0, "original_context": 16}
    | {"low_freq_factor": 0.1, "high_freq_factor": 3.0},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_context": 16, "beta_fast": 2.0, "beta_slow": 0.1},
}
_VOCABULARY = 400
_ROTATED = 6  # dimensions of a head, where a part of it turns

# A row a case, a digit a factor: which of its levels.
_ROWS = (
    "24100020111101101010",
    "00002101000010010100",
    "11221212101100111100",
    "32331112110011000010",
    "33012201111101001000",
    "23310020100010110110",
    "11200221000011001010",
    "02132220101101110100",
    "34121001110010010010",
    "20330102111100101100",
    "04002012000100101100",
    "20222100111011000010",
    "01011120101000010010",
    "22301211000110101111",
    "32210010101100101101",
    "13101110000111000010",
    "11332001101010010110",
    "30111222110100010100",
    "03320222100011110100",
    "12020001101011110001",
    "14310122101101011110",
    "04231202101001111001",
    "21032101111101000111",
    "10131010100000011011",
    "31101222101111111011",
    "13231101100001011111",
)

Row = tuple[int, ...]
Pair = tuple[tuple[int, int], tuple[int, int]]  # (factor, level) twice, the first factor first


class Chosen(NamedTuple):
    """What a row stands for.

    Args:
        name: Of the case.
        description: Its position, heads and mask, and every other choice that is not the first of its factor.
        config: The model.
        scan_layers: Whether the JAX twin scans over stacked blocks.
        new: Whether it has a level that no row before it has.
    """

    name: str
    description: str
    config: ModelConfig
    scan_layers: bool
    new: bool


def covering(base: ModelConfig, window: int) -> list[Chosen]:
    """The cases, all of them changes of one model.

    Args:
        base: GPT-2 with six heads.
        window: Of local layers.
    """
    chosen = []
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(_ROWS, start=1):
        levels = levels_of(row)
        new = not seen.issuperset(levels.items())
        seen.update(levels.items())
        always = (levels["position"], levels["heads"], levels["mask"])
        others = [level for name, level in levels.items() if level not in (*always, FACTORS[name][0])]
        model = _model(levels, base, window)
        chosen.append(
            Chosen(f"covering-{number:02}", ", ".join([*always, *others]), model, levels["blocks"] == "scanned", new)
        )
    return chosen


def levels_of(row: str) -> dict[str, str]:
    """The level of every factor in a row."""
    return {name: levels[int(digit)] for (name, levels), digit in zip(FACTORS.items(), row, strict=True)}


def rows() -> tuple[str, ...]:
    """A string a case, a digit a factor."""
    return _ROWS


def _model(levels: dict[str, str], base: ModelConfig, window: int) -> ModelConfig:
    fields: dict[str, Any] = {"n_layers": 2, "sliding_window": None if levels["mask"] == "full" else window}
    for level in levels.values():
        fields |= _CHOICES.get(level, {})
    head_dim = fields.get("head_dim", base.head_dim)
    if levels["rotated"] == "parts of heads turn":
        fields["rope_fraction"] = _ROTATED / head_dim
    if levels["scaling"] != "unscaled":
        fields["rope_scaling"] = _SCALING[levels["scaling"]] | {"local_layers": levels["mask"] == "window"}
    if levels["placement"] == "post" and levels["qk_norm"] == "no qk-norm":
        head_dim *= 16  # scores of a stream that no norm has tamed are four times as large
    return replace(base, **({"vocab_size": _VOCABULARY, "attention_scale": head_dim**-0.5} | fields))


@cache
def pairs() -> frozenset[Pair]:
    """Every pair of levels of two factors that a model can have."""
    levels = list(FACTORS.values())
    return frozenset(
        ((a, i), (b, j))
        for a, b in combinations(range(len(levels)), 2)
        for i, j in product(range(len(levels[a])), range(len(levels[b])))
        if _possible(levels[a][i], levels[b][j])
    )


def _possible(a: str, b: str) -> bool:
    return (a, b) not in _NEVER and (b, a) not in _NEVER


def pairs_of(row: Sequence[int]) -> Iterator[Pair]:
    """The pairs of levels in a row."""
    return combinations(enumerate(row), 2)


def cover(seed: int = 3, tries: int = 30) -> list[str]:
    """Rows with all pairs in them; each is the one out of some tries that brings the most new ones."""
    missing, found = set(pairs()), list[Row]()
    while missing:
        randoms = (Random(1000 * seed + 31 * len(found) + 7919 * number) for number in range(tries))
        found.append(max((_row(missing, random) for random in randoms), key=lambda row: _new(row, missing)))
        missing -= set(pairs_of(found[-1]))
    return ["".join(map(str, row)) for row in _scanned(found)]


def _scanned(found: Sequence[Row]) -> list[Row]:
    """Rows whose blocks are unrolled, which takes longer to compile, where a pair needs it alone."""
    place, kept = list(FACTORS).index("blocks"), list(found)
    for index, row in enumerate(found):
        scanned = (*row[:place], 0, *row[place + 1 :])
        others = {pair for other in (*kept[:index], scanned, *kept[index + 1 :]) for pair in pairs_of(other)}
        if pairs() <= others:
            kept[index] = scanned
    return kept


def _new(row: Row, missing: set[Pair]) -> int:
    return len(missing.intersection(pairs_of(row)))


def _row(missing: set[Pair], random: Random) -> Row:
    """A row that begins with a missing pair and goes on, in any order of factors, with what brings the most pairs."""
    levels = list(FACTORS.values())
    first = sorted(missing)[int(random.random() * len(missing))]
    row = dict(first)
    order = sorted(set(range(len(levels))) - set(row), key=lambda _: random.random())
    for factor in order:
        allowed = [
            level
            for level, name in enumerate(levels[factor])
            if all(_possible(name, levels[other][chosen]) for other, chosen in row.items())
        ]

        def new(level: int, factor: int = factor) -> int:
            return sum(tuple(sorted(((factor, level), other))) in missing for other in row.items())

        row[factor] = max(allowed, key=lambda level: (new(level), random.random()))
    return tuple(row[factor] for factor in range(len(levels)))


if __name__ == "__main__":
    print("\n".join(f'    "{row}",' for row in cover()))
