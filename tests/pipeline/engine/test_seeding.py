from __future__ import annotations

import pytest
import torch

from pipeline.engine.seeding import RandomStream, derive_seed

CPU = torch.device("cpu")


def test_distinct_purposes_have_distinct_seeds_that_torch_accepts() -> None:
    purposes = [
        (0, "order", 0),
        (0, "order", 1),
        (1, "order", 0),
        (0, "loss"),
        (10, "order"),
        (1, "0/order"),
        (0,),
    ]
    seeds = [derive_seed(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_derived_seed_is_the_same_in_every_process() -> None:
    assert derive_seed(0, "order", 0) == 0x36E5703597F5E537


@pytest.mark.usefixtures("untouched_randomness")
def test_a_stream_goes_on_where_it_was_left_and_hides_what_is_drawn() -> None:
    stream = RandomStream(3, CPU)
    drawn = []
    for _ in range(3):
        with stream.resumed():
            drawn.append(torch.rand(4))
        torch.rand(0)
    expected = torch.rand(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(drawn), expected)


@pytest.mark.usefixtures("untouched_randomness")
def test_streams_do_not_move_one_another() -> None:
    one, other = RandomStream(0, CPU), RandomStream(1, CPU)
    with one.resumed(), other.resumed():
        torch.rand(5)
    with one.resumed():
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.usefixtures("untouched_randomness")
def test_a_stream_knows_whether_anything_was_drawn() -> None:
    stream = RandomStream(0, CPU)
    with stream.resumed():
        torch.zeros(3).exp()
    assert not stream.moved
    with stream.resumed():
        torch.randint(5, (1,))
    assert stream.moved


@pytest.mark.usefixtures("untouched_randomness")
def test_an_error_inside_a_stream_restores_the_generators_too() -> None:
    stream = RandomStream(0, CPU)
    with pytest.raises(ZeroDivisionError), stream.resumed():
        torch.rand(3).sum().item() / 0
