"""The search for an algorithm, with a library that answers what the test says; its products are tested on a GPU (test_gemm)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fp8_recipes.kernels import cublaslt

KIND = cublaslt._Kind(0, 0, (16, 32, 64), (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32), (16, 16, 16), False)


class Library:
    """Every call succeeds; the search gives algorithms of these states."""

    def __init__(self, states: list[int], status: int = 0) -> None:
        self.states, self.status, self.asked = states, status, 0

    def __getattr__(self, name: str):
        return lambda *_: 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments) -> int:  # noqa: N802 - its name
        *_, self.asked, results, found = arguments
        found._obj.value = min(self.asked, len(self.states))
        for index, state in enumerate(self.states[: self.asked]):
            results[index].state, results[index].workspace = state, index
        return self.status


@pytest.fixture
def library(monkeypatch):
    def use(*arguments) -> Library:
        made = Library(*arguments)
        monkeypatch.setattr(cublaslt, "_library", lambda: made)
        monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
        cublaslt._plan.cache_clear()
        return made

    yield use
    cublaslt._plan.cache_clear()


def test_candidates_are_those_that_can_run_in_the_librarys_order(library):
    library([0, 7, 0, 0])
    assert [plan.algo.workspace for plan in cublaslt.candidates(KIND, 3)] == [0, 2]


def test_the_recommended_one_is_taken_and_searched_once(library):
    made = library([0, 0])
    plan = cublaslt._plan(KIND)
    assert plan is not None and plan.algo.workspace == 0 and made.asked == 1
    assert cublaslt._plan(KIND) is plan


@pytest.mark.parametrize("arguments", [([],), ([7],), ([0], cublaslt._NOT_SUPPORTED)])
def test_no_algorithm_is_none_and_another_failure_an_error(library, arguments):
    library(*arguments)
    assert cublaslt._plan(KIND) is None
    library([0], 14)
    with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic failed with cublasStatus 14"):
        cublaslt._plan(KIND)


def test_kind_knows_where_the_tensors_begin():
    q = SimpleNamespace(shape=(16, 64), payload=torch.zeros(16, 64, dtype=torch.uint8).view(torch.float8_e4m3fn))
    out = torch.zeros(17, 16)[1:]
    kind = cublaslt.kind_of(q, q, out, True)
    assert kind.shape == (16, 16, 64) and kind.fast and kind.alignment[2] == min(out.data_ptr() & -out.data_ptr(), 256) >= 16
