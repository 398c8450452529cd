import numpy as np
import pytest

from gpt_core.data.order import host_rows, key_of, permute, split_of
from gpt_core.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4096])
def test_a_permutation_hits_everything_once(size: int) -> None:
    assert sorted(permute(np.arange(size), size, key_of(0, size)).tolist()) == list(range(size))


def test_a_permutation_needs_no_neighbours() -> None:
    together = permute(np.arange(1000), 1000, 7)
    assert [int(permute([i], 1000, 7)[0]) for i in range(0, 1000, 99)] == together[::99].tolist()


def test_permutations_are_fixed_for_ever() -> None:
    assert permute(np.arange(10), 10, 5).tolist() == [1, 2, 7, 6, 5, 0, 3, 4, 9, 8]
    assert permute([0, 123_456_789], 10**12, key_of("windows", 0, 0)).tolist() == [968718851239, 395222896290]


def test_a_permutation_shuffles() -> None:
    moved = permute(np.arange(20_000), 20_000, 3).astype(float)
    assert abs(np.corrcoef(moved, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(moved[1:], moved[:-1])[0, 1]) < 0.03
    assert (permute(np.arange(20_000), 20_000, 4) != moved).mean() > 0.99


def test_the_split_follows_fraction_and_seed() -> None:
    documents = [str(i).encode() for i in range(20_000)]
    share = np.mean([split_of(document, 0.05, 1) == "validation" for document in documents])
    assert abs(share - 0.05) < 0.006
    assert {split_of(document, 0.0, 1) for document in documents} == {"train"}
    assert any(split_of(document, 0.05, 1) != split_of(document, 0.05, 2) for document in documents)


def test_hosts_share_the_rows() -> None:
    assert [list(host_rows(8, host, 4)) for host in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(InputError, match="batch_size = 8 is not a multiple of the 3 hosts"):
        host_rows(8, 0, 3)
