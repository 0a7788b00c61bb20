"""What the doctor says in the end: a line for each finding with its remedy, or the same as JSON, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dptrain.runtime.doctor.finding import Finding, Status

EXIT_PROBLEM = 78  # EX_CONFIG of sysexits.h: something about the machines has to be set right
_WORDS = {Status.OK: "ok", Status.WARNING: "warning", Status.FAILURE: "FAILURE"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings of an examination.

    Attributes:
        findings: in the order of the checks.
        rank: who reports; 0 speaks for all.
        world_size, num_hosts: ranks that were expected, and hosts that came.
        took_s: seconds from the start to the last finding.
        is_echo: whether rank 0 has said all that there is to say.
    """

    findings: Sequence[Finding]
    rank: int
    world_size: int
    num_hosts: int
    took_s: float
    is_echo: bool = False

    @property
    def code(self) -> int:
        """0 where training would start and be right; warnings do not count."""
        return EXIT_PROBLEM if any(finding.status is Status.FAILURE for finding in self.findings) else 0

    def as_text(self) -> str:
        """Return the report for a person."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        hosts = f"{self.num_hosts} host{'s' if self.num_hosts > 1 else ''}"
        spoken = "" if self.rank == 0 else f", seen from rank {self.rank}"
        lines = [f"dptrain doctor: {ranks}, {hosts}, {self.took_s:.1f} s{spoken}"]
        for finding in self.findings:
            lines.append(f"  {_WORDS[finding.status]:<8} {finding.check:<11} {finding.text}")
            if finding.remedy:
                lines.append(f"  {'':<8} {'':<11} → {finding.remedy}")
        problems = sum(finding.status is Status.FAILURE for finding in self.findings)
        lines.append(f"{problems} problem{'s' if problems > 1 else ''} found" if problems else "no problem found")
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """Return the report for a program, on one line."""
        record = {
            "ok": self.code == 0,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_hosts": self.num_hosts,
            "took_s": round(self.took_s, 3),
            "findings": [finding.as_record() for finding in self.findings],
        }
        return json.dumps(record, ensure_ascii=False) + "\n"
