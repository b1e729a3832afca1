"""The proof that `shipyard verify kernels` runs: it finds what is planted."""

import sys
from dataclasses import replace

import pytest
import torch
from shipyard.kernels import proof
from shipyard.kernels.decode import decode_attention
from shipyard.kernels.proof import Subject, examine, subjects
from shipyard.kernels.rms_norm import rms_norm, rms_norm_reference

ALL = {subject.name: subject for subject in subjects()}
NORM = ALL["rms_norm"]


@pytest.fixture
def planted(monkeypatch):
    """The errors of a planted fault are not the kernels': the datasheet must not collect them."""
    monkeypatch.delenv("SHIPYARD_KERNEL_RATIOS", raising=False)


def test_every_kernel_is_a_subject():
    assert {name.split(",")[0].split(" ")[0] for name in ALL} == {
        "attention", "decode", "rope", "rms_norm", "swiglu", "linear_cross_entropy"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["decode", "rope NeoX", "rope interleaved", "rms_norm, residual"])
def test_sound_kernels_hold(name):
    verdict = examine(ALL[name], torch.bfloat16)
    assert verdict.holds, verdict
    assert verdict.laws >= 3


def test_a_coarse_kernel_fails_its_bars(planted):
    """A norm whose sum of squares is rounded to bf16 is caught by its error, and by nothing else."""

    def coarse(x, w, index=None):
        scale = x.float().pow(2).mean(-1, keepdim=True).bfloat16().float()
        return (w * (x.float() * torch.rsqrt(scale + 1e-6))).to(x.dtype)

    verdict = examine(replace(NORM, mine=coarse), torch.bfloat16)
    assert not verdict.holds
    assert (verdict.faults, verdict.broken) == ((), ())
    assert verdict.rms > 1


def test_a_split_that_depends_on_the_batch_breaks_a_law(planted, monkeypatch):
    """The usual way of decoding: more splits where the batch is small. Accurate, clean, and not batch-invariant."""
    decode = sys.modules["shipyard.kernels.decode"]

    def by_batch(q, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(decode, "SPLIT_KEYS", 256 if len(q) > 1 else 128)
            return decode_attention(q, *rest)

    monkeypatch.setattr(proof, "decode_attention", by_batch)
    verdict = examine(ALL["decode"], torch.bfloat16)
    assert verdict.broken == ("a sequence alone",)
    assert not verdict.holds


def test_an_output_left_unwritten_is_named(planted):

    def half_written(x, w, index=None):
        out = torch.empty_like(x)
        return torch.cat([rms_norm(x, w, 1e-6)[:64], out[64:]])

    verdict = examine(Subject("half", NORM.sample, half_written, rms_norm_reference_of, NORM.laws), torch.bfloat16)
    assert not verdict.holds
    assert any("nobody wrote" in fault for fault in verdict.faults)


def rms_norm_reference_of(x, w):
    return rms_norm_reference(x, w, 1e-6)
