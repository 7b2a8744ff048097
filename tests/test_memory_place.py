"""Where a memory's vectors lie: beside all else, or in main memory, from which those that are searched are fetched."""

import pytest
import torch

from default import make_config
from models import memory
from models.memory import Memory, Remembering, squared
from stage import new_scorer
from tests.test_memory import IMAGES, VIEWS, fitted, levels
from tests.test_vqflow import CHANNELS

META = torch.device("meta")  # stands for a device that is not the host


def test_only_vectors_stay_in_main_memory() -> None:
    kept = fitted()
    order = list(kept.state_dict())
    kept.place = "host"
    kept.to(META)
    places = {name: value.device.type for name, value in kept.named_buffers()}
    assert places == {"descriptors": "meta"} | {f"vectors_{v}": "cpu" for v in range(len(VIEWS))}
    assert list(kept.state_dict()) == order
    kept.place = "device"
    kept.to(META)
    assert {value.device.type for value in kept.buffers()} == {"meta"}


def test_auto_leaves_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, cuda = fitted(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert [kept.stays(size, cuda) for size in (499, 500, 501)] == [False, False, True]
    assert not kept.stays(10**15, torch.device("cpu")), "it is there already"
    kept.place = "device"
    assert not kept.stays(501, cuda)
    kept.place = "host"
    assert kept.stays(1, cuda)


def test_the_setting_reaches_the_memory() -> None:
    for place in ("auto", "host"):
        scorer = new_scorer(make_config(memory=5, memory_place=place).model, CHANNELS)
        assert scorer.memory is not None and scorer.memory.place == place
    assert new_scorer(make_config(memory_place="host").model, CHANNELS).memory is None


def test_distances_are_the_same_wherever_vectors_lie() -> None:
    here, there, asked = fitted(search=(3,)), fitted(search=(3,)), levels(2, 5)
    there.place = "host"
    for a, b in zip(here(asked), there(asked), strict=True):
        assert torch.equal(a, b)


def test_what_will_stay_is_gathered_there() -> None:
    features = [f.to(META) for f in levels(IMAGES, 0)]
    for place, expected in (("host", "cpu"), ("device", "meta"), ("auto", "meta")):
        kept = Memory(channels=CHANNELS, views=VIEWS, search=(3,))
        kept.place = place
        remembering = Remembering(kept, images=IMAGES, size=5)
        remembering.coverage = remembering._coverage(features)
        assert remembering._place(features).type == expected


@pytest.mark.parametrize("known", [1, 1024, 1025, 3000])
def test_descriptors_are_compared_part_by_part(known: int) -> None:
    torch.manual_seed(known)
    kept = Memory(channels=CHANNELS, views=VIEWS, search=(7,))
    kept.descriptors = torch.randn(known, CHANNELS[-1]).half()
    asked = torch.randn(3, CHANNELS[-1])
    gaps = squared(asked, kept.descriptors.float())
    assert torch.equal(
        kept._most_alike(asked, True).sort(1).values, gaps.topk(min(7, known), largest=False).indices.sort(1).values
    )
    assert memory.AT_ONCE["cpu"] == 1024
