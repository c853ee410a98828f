"""Rows in the order of length: an epoch has one order, also in a run that resumes."""

from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

from ivg.training.trainer import EpochLengthSampler

LENGTHS = [1 + i % 7 for i in range(48)]


def loader(seed=3):
    return Accelerator(cpu=True).prepare(DataLoader(range(48), batch_size=4, sampler=EpochLengthSampler(4, LENGTHS, seed)))


def rows(batches, epoch):
    batches.set_epoch(epoch)
    return [batch.tolist() for batch in batches]


def test_a_resumed_epoch_goes_on_where_it_was():
    whole = loader()
    first, second = rows(whole, 0), rows(whole, 1)
    assert first != second and all(sorted(row for batch in epoch for row in batch) == list(range(48)) for epoch in (first, second))
    assert rows(skip_first_batches(loader(), 5), 1) == second[5:]
    assert rows(loader(), 0) == first and rows(loader(seed=4), 0) != first
