"""Kernels of a decode step on an Apple GPU, and how fast a step of so many would be: predicted, nothing is measured.

    seconds = bytes / (share of the bandwidth that kernels of a width stream at x bandwidth) + kernels x cost of one

python -m scripts.roofline prints it for the devices whose entry in devices.json has `streaming` and `dispatch_us`, both
assumed from what others measured. The kernels are counted: tests/test_metal_steps.py compiles steps and compares.
"""
from dataclasses import dataclass

from config import AttentionConfig, ModelConfig

ATTENTION, GATE, DELTA_NET = 10, 1, 9  # a layer's, feed-forward included, at batch 1
REST = 6  # final norm, head, the likeliest token in three, its position
LONG = 1024  # slots of a cache past which attention takes two


def kernels_of_step(config: ModelConfig, slots: int) -> int | None:
    """Of a greedy step with caches of so many positions; None where nobody has counted: with experts, or with
    per-layer embeddings."""
    if config.experts or config.per_layer_dim:
        return None
    mixers = [config.mixers[kind] for kind in config.layer_types]
    return REST + sum(ATTENTION + GATE * mixer.gated + (min(slots, mixer.window or slots) > LONG)
                      if isinstance(mixer, AttentionConfig) else DELTA_NET for mixer in mixers)


@dataclass(frozen=True)
class KernelCost:
    """What a device's entry says of kernels."""
    shares: dict[str, float]  # bits of a weight -> share of the datasheet's bandwidth
    seconds: list[float]  # of a kernel that waits for the one before: the least, the likely, the largest

    @classmethod
    def read(cls, entry: dict) -> "KernelCost | None":
        if "dispatch_us" not in entry:
            return None
        return cls(entry["streaming"]["value"], [us * 1e-6 for us in entry["dispatch_us"]["value"]])

    def share(self, dtype: str) -> float | None:
        return self.shares.get({"bf16": "16", "fp16": "16", "int8": "8"}.get(dtype, "4" if "int4" in dtype else ""))

    def tok_s(self, size: int, bandwidth: float, kernels: int, dtype: str) -> list[float]:
        """Tokens/s of steps that read so many bytes, one for each cost of a kernel; none for widths nobody has timed.
        """
        share = self.share(dtype)
        return [1 / (size / (share * bandwidth) + kernels * cost) for cost in self.seconds] if share else []

    def describe(self, tok_s: list[float], kernels: int, dtype: str) -> str:
        costs, speeds = (" / ".join(f"{x:g}" for x in of) for of in (
            [round(s * 1e6, 1) for s in self.seconds], [round(s, 1) for s in tok_s]))
        return (f"predicted, not measured: {speeds} tok/s, if {kernels} kernels take {costs} us each beside "
                f"{self.share(dtype):.2f} of the bandwidth")
