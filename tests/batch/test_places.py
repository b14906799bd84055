"""How processes divide a cluster: threads and GPUs of each, and refusals that say the numbers."""

import pytest

from zimage.batch.places import Node, least_cpus, needed_for, shares
from zimage.errors import RequestError
from zimage.settings.scale import BatchSettings

GPUS = [Node(32, 4), Node(16, 2)]


def divided(nodes, loading=None, **settings):
    """(count, threads, GPUs) of workers and of encoders."""
    found = shares(BatchSettings(**settings), loading or {}, nodes)
    return tuple((share.count, share.cpus, share.gpus) for share in (found.workers, found.encoders))


CASES = {
    "one worker has all threads": (([Node(8, 0)], {}), {}, ((1, 8, 0), (0, 8, 0))),
    "several share them": (([Node(8, 0)], {}), {"workers": 3}, ((3, 2, 0), (0, 2, 0))),
    "encoders have their share": (([Node(8, 0)], {}), {"workers": 2, "encoders": 2}, ((2, 2, 0), (2, 2, 0))),
    "threads are not spread over machines": (([Node(3, 0), Node(3, 0)], {}), {"workers": 3}, ((3, 1, 0), (0, 1, 0))),
    "a worker for each GPU": ((GPUS, {}), {}, ((6, 8, 1), (0, 8, 0))),
    "but for those that encode": ((GPUS, {}), {"encoders": 2}, ((4, 8, 1), (2, 8, 1))),
    "encoders on CPUs take none": (
        (GPUS, {"text_encoder_device": "cpu"}),
        {"encoders": 2},
        ((6, 5, 1), (2, 5, 0)),
    ),
    "on the CPUs of machines with GPUs": ((GPUS, {"device": "cpu"}), {"workers": 4}, ((4, 10, 0), (0, 10, 0))),
    "a DiT on a GPU beside the rest": (
        ([Node(8, 1)], {"device": "cpu", "dit_device": "cuda"}),
        {},
        ((1, 8, 1), (0, 8, 0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_shares(name):
    (nodes, loading), settings, expected = CASES[name]
    assert divided(nodes, loading, **settings) == expected


@pytest.mark.parametrize(
    ("nodes", "loading", "settings", "said"),
    [
        (GPUS, {}, {"workers": 7}, "7 workers and 0 encoders need 7 GPUs, and the cluster has 6"),
        (GPUS, {}, {"workers": 5, "encoders": 2}, "5 workers and 2 encoders need 7 GPUs"),
        ([Node(8, 0)], {"device": "cuda"}, {}, "1 workers and 0 encoders need 1 GPUs, and the cluster has 0"),
        ([Node(2, 0)], {}, {"workers": 3}, "3 processes need a CPU each, and the cluster has 2"),
        (GPUS, {"device": "cuda:1"}, {}, "device cuda:1: each worker gets a GPU of its own; pass cuda"),
        (GPUS, {"vae_device": "cuda:1"}, {}, "vae_device cuda:1: each worker"),
    ],
)
def test_what_does_not_fit_is_refused(nodes, loading, settings, said):
    with pytest.raises(RequestError) as raised:
        divided(nodes, loading, **settings)
    assert said in str(raised.value)
    assert raised.value.fields


def test_a_cluster_of_our_own_has_a_cpu_for_each():
    assert [least_cpus(BatchSettings(workers=w, encoders=e), 2) for w, e in ((None, 0), (2, 0), (2, 3))] == [2, 2, 5]


def test_a_cluster_of_our_own_has_no_more_processes_than_fit_into_memory():
    with pytest.raises(
        RequestError, match=r"10,000 processes need more than 2500.0 GB without their models, and"
    ) as raised:
        least_cpus(BatchSettings(workers=9_990, encoders=10), 2)
    assert raised.value.fields == ("workers", "encoders")


def test_there_are_no_more_processes_than_rows():
    asked = BatchSettings(workers=10_000, encoders=5)
    assert needed_for(2, asked) == BatchSettings(workers=2, encoders=2)
    assert needed_for(7, BatchSettings(encoders=5)) == BatchSettings(encoders=5)  # GPUs are counted later
