from __future__ import annotations

import numpy as np
import pytest
import torch

from personvit.errors import DataError
from personvit.retrieval.checks import check_features

GOOD = torch.eye(4, 3)[:3]


def with_value(value):
    features = GOOD.clone()
    features[1, 2] = value
    return features


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        (
            with_value(torch.nan),
            GOOD,
            r"1 of 3 query features hold NaN, infinity .*\(first: row 1\).*model.weights=FILE",
        ),
        (GOOD, with_value(torch.inf), "1 of 3 gallery features hold NaN, infinity"),
        (GOOD, with_value(1e19), "squares overflow"),
        (GOOD, torch.eye(4, 3), r"1 of 4 gallery features hold only zeros \(first: row 3\)"),
        (GOOD, torch.ones(2, 5), "Query features have 3 dimensions, gallery features 5"),
        (torch.ones(0, 3), GOOD, r"query is empty \(0 rows.*data.root=FOLDER"),
        (GOOD, torch.ones(0, 3), "gallery is empty"),
        (GOOD, torch.ones(2, 0), "gallery is empty"),
        (GOOD, torch.ones(3), r"gallery is a torch.float32 array of shape \[3\]"),
        (GOOD.long(), GOOD, "query is a torch.int64 array"),
    ],
)
def test_bad_features_are_named(query, gallery, message):
    with pytest.raises(DataError, match=message):
        check_features(query, gallery)


def test_arrays_and_wide_types_become_float32_without_gradient():
    query, gallery = check_features(np.eye(3), torch.eye(3, dtype=torch.float16).requires_grad_())
    assert query.dtype == gallery.dtype == torch.float32
    assert not gallery.requires_grad
    assert torch.equal(query, gallery)


def test_rows_of_another_layout_become_contiguous():
    query, _ = check_features(torch.rand(3, 5).t(), torch.rand(4, 3))
    assert query.is_contiguous()
