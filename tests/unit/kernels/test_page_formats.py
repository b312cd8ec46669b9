# SPDX-License-Identifier: Apache-2.0
"""Pages hold the nearest numbers that their type can say, and give those back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvserve.engine.devices.cpu_converting import ConvertingCPUDevice
from kvserve.errors import UserError
from kvserve.kernels import native
from kvserve.kernels.page_formats import FORMATS, FP8, INT8
from tests.reference.quantised import CACHES, e4m3_numbers, int8_numbers, nearest
from tests.unit.device_pages import check_mass, check_round_trip

compiled = pytest.mark.skipif(
    not native.can_attend(torch.float32, 64, 32), reason="needs a C++ compiler"
)
BY_NAME = pytest.mark.parametrize("name", FORMATS)
NUMBERS = {INT8.name: int8_numbers(), FP8.name: e4m3_numbers()}


def tokens(count: int, width: int) -> Tensor:
    """Random tokens of all sizes; one of nothing, some whose numbers are far apart."""
    found = torch.randn(count, width) * 10 ** torch.linspace(-9, 4, count)[:, None]
    found[0] = 0
    found[1::3, 5] *= 1000
    return found


def test_bytes_of_a_token() -> None:
    sizes = {name: known.token_bytes(64) for name, known in FORMATS.items()}
    assert sizes == {"bfloat16": 256, INT8.name: 136, FP8.name: 136}


@BY_NAME
def test_every_token_is_rounded_as_the_reference_rounds_it(name: str) -> None:
    torch.manual_seed(1)
    drawn = tokens(64, 64)
    assert torch.equal(FORMATS[name].round_trip(drawn), CACHES[name](drawn))


@pytest.mark.parametrize("name", NUMBERS)
def test_what_a_byte_can_say_stays_as_it_is(name: str) -> None:
    numbers = torch.tensor(NUMBERS[name])[None]
    assert torch.equal(FORMATS[name].round_trip(numbers), numbers)


@compiled
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "width"), [(32, 64), (64, 128), (96, 32)])
def test_what_is_written_reads_as_the_reference_rounds_it(
    name: str, dtype: torch.dtype, page_size: int, width: int
) -> None:
    torch.manual_seed(page_size)
    device = ConvertingCPUDevice(FORMATS[name], dtype, 3, width, page_size)
    keys, values = (tokens(3 * page_size, width).to(dtype) for _ in range(2))
    pool = empty_pool(name, 6, page_size, width)
    check_round_trip(
        device, pool, keys, values, as_read=lambda given: CACHES[name](given.float())
    )


@compiled
@pytest.mark.parametrize("name", NUMBERS)
def test_between_two_numbers_the_even_one_is_nearest(name: str) -> None:
    table = torch.tensor(NUMBERS[name], dtype=torch.float64)
    halfway = ((table[1:] + table[:-1]) / 2).float()
    device = ConvertingCPUDevice(FORMATS[name], torch.float32, 1, 256, 32)
    # The greatest number, last, makes the scale 1.
    token = torch.zeros(1, 256)
    token[0, : len(halfway)], token[0, -1] = halfway, table[-1]
    pool = empty_pool(name, 1, 32, 256)
    device.write(token, token, pool, torch.tensor([0]))
    (read,) = device.read_values(pool, torch.tensor([0]))
    assert torch.equal(read[0], nearest(NUMBERS[name], token[0]).float())


@compiled
@BY_NAME
def test_what_was_read_can_be_written_again(name: str) -> None:
    """Survivors of a selection move to other pages."""
    torch.manual_seed(3)
    device = ConvertingCPUDevice(FORMATS[name], torch.float32, 3, 64, 32)
    pool, slots = empty_pool(name, 3, 32, 64), torch.arange(32)
    device.write(*torch.randn(2, 32, 64), pool, slots)
    first = device.read_keys(pool, torch.tensor([0]))
    values = device.read_values(pool, torch.tensor([0]))
    device.write(first[0], values[0], pool, slots + 64)
    again = device.read_keys(pool, torch.tensor([2]))
    torch.testing.assert_close(again, first, rtol=3e-7, atol=0)


@compiled
@BY_NAME
def test_attention_mass_is_that_of_the_rounded_keys(name: str) -> None:
    torch.manual_seed(2)
    device = ConvertingCPUDevice(FORMATS[name], torch.float32, 3, 64, 32)
    keys, query = torch.randn(96, 64), torch.randn(2, 3, 64)
    pool = empty_pool(name, 9, 32, 64)
    check_mass(device, pool, keys, query, as_read=CACHES[name])


def test_without_a_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(UserError, match=r"--kv-cache-dtype=int8.*install g\+\+"):
        ConvertingCPUDevice(INT8, torch.float32, 3, 64, 32)


def empty_pool(name: str, pages: int, page_size: int, width: int) -> Tensor:
    kind = FORMATS[name]
    return torch.zeros(kind.pool_shape(pages, page_size, width), dtype=kind.pool)
