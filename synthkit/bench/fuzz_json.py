"""Hypothesis strategies for records: any JSON, and honest records with any JSON put somewhere in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from synthkit.bench.fuzz_mutate import EDGES, TEXTS, places

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(EDGES).map(lambda n: n)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
    | st.sampled_from(TEXTS)
)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@st.composite
def records(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """The bytes of a record."""
    if draw(st.integers(0, 9)) == 0:
        return json.dumps(draw(st.dictionaries(st.text(max_size=10), JSON, max_size=6))).encode()
    record = copy.deepcopy(json.loads(draw(st.sampled_from(list(seeds)))))
    for _ in range(draw(st.integers(1, 3))):
        spots = places(record)
        if not spots:
            break
        holder, key = spots[draw(st.integers(0, len(spots) - 1))]
        if draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = draw(JSON)
    return json.dumps(record).encode()
