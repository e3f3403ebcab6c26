import pytest
import torch.distributed as dist

from limpq_ext.nn.processes import alone, is_distributed
from limpq_ext.training.distributed import from_main


@pytest.fixture
def two_processes(monkeypatch):
    """This process as the first of two that exchange nothing."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: None)


def test_one_process_is_not_several():
    assert not is_distributed()


@pytest.mark.usefixtures("two_processes")
def test_a_process_is_alone_within_the_block_and_when_the_block_fails():
    assert is_distributed()
    with alone():
        assert not is_distributed()
    with pytest.raises(ValueError, match="reason"), alone():
        raise ValueError("reason")
    assert is_distributed()


@pytest.mark.usefixtures("two_processes")
def test_what_the_first_process_does_for_all_it_does_alone():
    assert from_main(is_distributed) is False
