"""Top-k records: the mass, the top-1 and the k probabilities are kept; what other temperatures cost is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthkit.bank.labels.topk import compress_topk, expand_topk, tail_error
from synthkit.errors import UsageError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def softmax(x: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    x = x.astype(np.float64) / temperature
    odds = np.exp(x - x.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def test_against_a_row_by_hand():
    index, logit, tail = compress_topk(np.array([[0.0, 3.0, 1.0, 2.0, 0.0]]), 2)
    assert index.tolist() == [[1, 3]] and logit.tolist() == [[3.0, 2.0]]
    assert tail[0] == pytest.approx(np.log(np.e + 2), abs=1e-6)  # classes 2, 0 and 4
    dense = expand_topk(index, logit, tail, 5)
    assert dense[0, [1, 3]].tolist() == [3.0, 2.0]
    assert np.allclose(dense[0, [0, 2, 4]], np.log((np.e + 2) / 3))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_k_probabilities_mass_and_top1_are_kept(library):
    logits = np.random.default_rng(0).normal(0, 4, (200, 50)).astype(np.float16)
    given_ = torch.from_numpy(logits) if library == "torch" else logits
    for k in (1, 5, 49):
        index, logit, tail = compress_topk(given_, k)
        dense = np.asarray(expand_topk(index, logit, tail, 50))
        index, dtypes = np.asarray(index), (np.asarray(logit).dtype, np.asarray(tail).dtype)
        assert dtypes == (np.float16, np.float32) and dense.dtype == np.float32 and dense.shape == (200, 50)
        want, got = softmax(logits), softmax(dense)
        assert np.abs(np.take_along_axis(want - got, index, 1)).max() < 2e-6
        assert np.array_equal(dense.argmax(1), logits.argmax(1))
        assert np.array_equal(np.take_along_axis(logits, index, 1), np.asarray(logit))  # to the bit


def test_one_class_in_the_tail_is_exact():
    logits = np.random.default_rng(1).normal(0, 9, (300, 10)).astype(np.float16)
    logits[0] = 1.5  # all equal
    for given_ in (logits, torch.from_numpy(logits)):
        assert np.array_equal(np.asarray(expand_topk(*compress_topk(given_, 9), 10)), logits.astype(np.float32))


def test_both_libraries_give_one_record():
    logits = np.random.default_rng(2).normal(0, 3, (100, 20)).astype(np.float32).round(1)  # with ties
    ours, theirs = compress_topk(logits, 6), compress_topk(torch.from_numpy(logits), 6)
    assert np.array_equal(ours[0], theirs[0].numpy()) and np.array_equal(ours[1], theirs[1].numpy())
    assert np.abs(ours[2] - theirs[2].numpy()).max() < 2e-6
    assert np.array_equal(compress_topk(logits.astype(np.float16), 6)[0], ours[0])  # from the dense record: the same


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.data())
def test_whatever_the_logits_the_first_class_stays_first(data):
    classes = data.draw(st.integers(2, 12))
    value = st.floats(-60000, 60000, width=16) | st.sampled_from([0.0, 1.0, -1.0, 10.0])
    logits = np.array([data.draw(st.lists(value, min_size=classes, max_size=classes))], np.float16)
    dense = expand_topk(*compress_topk(logits, data.draw(st.integers(1, classes - 1))), classes)
    assert np.isfinite(dense).all()
    assert dense.argmax(1) == logits.argmax(1)
    assert np.abs(softmax(dense).max() - softmax(logits).max()) < 1e-3


def test_other_temperatures_have_an_error_of_known_size():
    """K = 100 normal logits of standard deviation 3 (a soft teacher), k = 10; recorded from a run of this test."""
    logits = np.random.default_rng(3).normal(0, 3, (500, 100))
    measured = {t: tail_error(logits, 10, t) for t in (1.0, 2.0, 4.0, 20.0)}
    for temperature, expected in EXPECTED_ERROR.items():
        assert measured[temperature] == pytest.approx(expected, abs=0.002), measured
    # at T = 1 the k probabilities are right and only the tail's own shape is lost
    even = softmax(np.asarray(expand_topk(*compress_topk(logits, 10), 100)))
    assert np.abs(even.sum(1) - 1).max() < 1e-9
    # the even tail is the heaviest one at T > 1 (Jensen): its mass errs upwards
    index = compress_topk(logits, 10)[0]
    for t, sign in ((4.0, 1), (0.5, -1)):
        true = np.take_along_axis(softmax(logits.astype(np.float16), t), index, 1).sum(1)
        kept = np.take_along_axis(softmax(np.asarray(expand_topk(*compress_topk(logits, 10), 100)), t), index, 1).sum(1)
        assert (sign * (true - kept) > -1e-6).all()


EXPECTED_ERROR = {1.0: 0.0722, 2.0: 0.2459, 4.0: 0.2034, 20.0: 0.0492}


def test_what_cannot_be_stored_is_refused():
    for k in (0, 10, 11):
        with pytest.raises(UsageError, match="k must be 1 to 9"):
            compress_topk(np.zeros((3, 10)), k)
    with pytest.raises(UsageError, match="must be"):
        compress_topk(np.zeros(10), 3)
