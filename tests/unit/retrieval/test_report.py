from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.retrieval.evaluation import rank_blocks
from personvit.retrieval.metrics import Labels
from personvit.retrieval.report import queries_as_csv, queries_as_json, query_rows, table

# Query 0: junk g0, then match g1, other g2, match g3. Query 1: nobody like it. Query 2: match behind two others.
DISTANCES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.9, 0.3]])
LABELS = Labels(np.array([7, 9, 5]), np.array([7, 7, 5, 7]), np.array([0, 0, 0]), np.array([0, 1, 1, 2]))


@pytest.fixture
def reid_set():
    query = ReIDSplit([f"q{k}.jpg" for k in range(3)], LABELS.q_pids, LABELS.q_camids)
    gallery = ReIDSplit([f"g{k}.jpg" for k in range(4)], LABELS.g_pids, LABELS.g_camids)
    return ReIDSet("market1501", gallery, query, gallery, "/data")


@pytest.fixture
def ranking():
    return rank_blocks(DISTANCES.split(2), LABELS, top=10)


def test_rows_tell_what_happened_to_each_query(reid_set, ranking):
    first, second, third = query_rows(reid_set, ranking, None)
    assert first == {
        "data": "market1501",
        "query": "q0.jpg",
        "pid": 7,
        "camid": 0,
        "valid": True,
        "AP": pytest.approx((1 + 2 / 3) / 2),
        "INP": pytest.approx(2 / 3),
        "first_match": 1,
        "top": ["g1.jpg", "g2.jpg", "g3.jpg"],  # g0 is left out by the protocol
    }
    assert (second["valid"], second["AP"], second["INP"], second["first_match"]) == (False, None, None, None)
    assert second["top"] == ["g3.jpg", "g2.jpg", "g1.jpg", "g0.jpg"]
    assert (third["first_match"], third["AP"]) == (4, 0.25)
    assert third["top"][third["first_match"] - 1] == "g2.jpg"


def test_json_and_csv_hold_the_same(reid_set, ranking):
    rows = query_rows(reid_set, ranking, ranking)
    assert json.loads(queries_as_json(rows)) == rows
    read = list(csv.DictReader(queries_as_csv(rows).splitlines()))
    assert [row["query"] for row in read] == ["q0.jpg", "q1.jpg", "q2.jpg"]
    assert [row["valid"] for row in read] == ["1", "0", "1"]
    assert read[1]["AP"] == ""
    assert float(read[0]["rerank_AP"]) == rows[0]["AP"]
    assert [read[0][f"top{k}"] for k in range(1, 5)] == ["g1.jpg", "g2.jpg", "g3.jpg", ""]
    assert read[2]["rerank_top4"] == "g2.jpg"


def test_table_has_columns_for_re_ranking_and_rows_for_sets(ranking):
    one = table({"market1501": (ranking.result, None)}).splitlines()
    assert one[0].split() == ["mAP", "R1", "R5", "R10", "mINP"]
    both = table({"market1501": (ranking.result, ranking.result), "msmt17": (ranking.result, ranking.result)})
    header, first, second = both.splitlines()
    assert header.split()[0] == "data"
    assert header.split()[6:] == ["rr-mAP", "rr-R1", "rr-R5", "rr-R10", "rr-mINP"]
    assert (first.split()[0], second.split()[0]) == ("market1501", "msmt17")
    assert first.split()[1:6] == first.split()[6:] == one[1].split()
    assert len({len(line) for line in (header, first, second)}) == 1


def test_protocol_keep_counts_the_own_camera(reid_set):
    ranking = rank_blocks([DISTANCES], LABELS.under("keep"), top=2)
    np.testing.assert_array_equal(ranking.result.all_first, [1, 4])
    np.testing.assert_array_equal(ranking.top, [[0, 1], [3, 2], [0, 1]])
