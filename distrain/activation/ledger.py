"""What the activation manager has done, counted where it happens, and the report that is read from it."""

from dataclasses import dataclass

from .host_pool import HostPool

MIB = 2**20


@dataclass(slots=True)
class Ledger:
    """Running counts of one manager."""

    device_bytes: int = 0
    """saved tensors and rounding buffers on the device now"""
    peak_device_bytes: int = 0
    kept_bytes: int = 0
    """saved bytes that stayed on the device, of all layers since the last report; so the next two"""
    swapped_bytes: int = 0
    recomputed_bytes: int = 0
    not_by_token_bytes: int = 0
    """of layers that recompute, what could not be made again: attention, and what was found to mix tokens"""
    num_layers: int = 0
    """forwards of managed layers with gradients"""
    num_saved: int = 0
    """tensors that autograd saved and the manager took"""
    num_passed: int = 0
    """those that it let pass: parameters and constants"""
    num_units: int = 0
    """storages behind the saved tensors; the difference was not stored twice"""
    num_fetched_ahead: int = 0
    num_replays: int = 0
    num_other_lengths: int = 0
    """forwards with another number of tokens than planned"""
    num_other_forms: int = 0
    """forwards in which a layer saved something else than the first time with as many tokens"""
    num_left_whole: int = 0
    """storages that were to be cut by tokens and could not be"""
    num_unreadable: int = 0
    """forwards that could not be written down, and so were not recomputed"""
    most_kept_bytes: int = 0
    """most that stayed on the device at a time, by the cuts"""
    most_returning_bytes: int = 0
    """most that two layers in a row bring back to the device, by the cuts"""

    def hold(self, num_bytes: int) -> None:
        """Bytes came to the device, or (negative) left it."""
        self.device_bytes += num_bytes
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def report(self, pool: HostPool) -> "ActivationReport":
        """As it stands."""
        return ActivationReport(
            planned_device_bytes=self.most_kept_bytes + self.most_returning_bytes,
            peak_device_bytes=self.peak_device_bytes,
            kept_bytes=self.kept_bytes,
            swapped_bytes=self.swapped_bytes,
            recomputed_bytes=self.recomputed_bytes,
            not_by_token_bytes=self.not_by_token_bytes,
            host_bytes=pool.held_bytes,
            host_peak_bytes=pool.peak_bytes,
            host_reserved_bytes=pool.reserved_bytes,
            num_layers=self.num_layers,
            num_saved=self.num_saved,
            num_units=self.num_units,
            num_passed=self.num_passed,
            num_replays=self.num_replays,
            num_fetched_ahead=self.num_fetched_ahead,
            num_refused=pool.num_refused,
            num_other_lengths=self.num_other_lengths,
            num_other_forms=self.num_other_forms,
            num_left_whole=self.num_left_whole,
            num_unreadable=self.num_unreadable,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationReport:
    """What one manager did since its last report. Bytes of activations only, as the manager counts them."""

    planned_device_bytes: int
    """what stays and the two rounding buffers, from the units as they were cut"""
    peak_device_bytes: int
    """most saved bytes on the device at a time, measured"""
    kept_bytes: int
    swapped_bytes: int
    recomputed_bytes: int
    not_by_token_bytes: int
    """of what was kept or swapped, all that is not made again by token in layers that recompute"""
    host_bytes: int
    """held now: zero after a step"""
    host_peak_bytes: int
    host_reserved_bytes: int
    num_layers: int
    num_saved: int
    num_units: int
    num_passed: int
    num_replays: int
    num_fetched_ahead: int
    num_refused: int
    """units that stayed on the device because the host pool was full"""
    num_other_lengths: int
    num_other_forms: int
    num_left_whole: int
    num_unreadable: int

    @property
    def as_planned(self) -> bool:
        """Whether every layer did what the plan says."""
        return not (
            self.num_refused
            or self.num_other_lengths
            or self.num_other_forms
            or self.num_left_whole
            or self.num_unreadable
        )

    def __str__(self) -> str:
        lines = [
            f"activations on the device: planned {self.planned_device_bytes / MIB:,.1f} MiB, "
            f"measured peak {self.peak_device_bytes / MIB:,.1f} MiB",
            f"kept {self.kept_bytes / MIB:,.1f} MiB, swapped {self.swapped_bytes / MIB:,.1f} MiB, "
            f"recomputed {self.recomputed_bytes / MIB:,.1f} MiB",
            f"not made again by token: {self.not_by_token_bytes / MIB:,.1f} MiB "
            "(attention, and what was found to mix tokens)",
            f"host: peak {self.host_peak_bytes / MIB:,.1f} of {self.host_reserved_bytes / MIB:,.1f} MiB, "
            f"now {self.host_bytes / MIB:,.1f} MiB",
        ]
        if not self.as_planned:
            lines.append(
                f"off plan: {self.num_other_lengths} other lengths, {self.num_other_forms} other forms, "
                f"{self.num_left_whole} storages whole, {self.num_refused} refused by the host, "
                f"{self.num_unreadable} layers unreadable"
            )
        return "\n".join(lines)
