"""Keys and values of every kind that items may have, for hypothesis."""

from __future__ import annotations

import math

from hypothesis import strategies as st

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
integers = st.integers() | st.sampled_from([2**1000, -(2**1000), int(1e300), 2**61 - 1, 2**63, 2**64, 10**4299])
numbers = st.booleans() | integers | st.floats(allow_nan=False) | st.sampled_from([1.0, -0.0])
key_scalars = st.none() | numbers | texts
scalars = key_scalars | st.just(math.nan)
keys = st.recursive(key_scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(scalars, inner, max_size=3)
    ),
    max_leaves=8,
)
