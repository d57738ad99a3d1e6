"""The steps in a directory of checkpoints: which there are, which is intact, which are kept."""

import sys

from etils import epath

from jaxgen import distributed
from jaxgen.checkpoint import address, record
from jaxgen.errors import UserError

_DIGITS = 8


class Steps:
    """The folders of one directory, each named for its step.

    Every process may look; process 0 alone verifies, chooses for all, and removes.
    """

    def __init__(self, directory: epath.Path, timeout_s: float):
        """Touches nothing yet. `timeout_s` bounds the wait for process 0."""
        self.directory = directory
        self._timeout_s = timeout_s
        self._damaged: set[int] = set()
        self._verified: set[tuple[int, str | None]] = set()
        self._swept = False

    def folder(self, step: int) -> epath.Path:
        """Where a step is, or would be."""
        return self.directory / f"{step:0{_DIGITS}d}"

    def completed(self) -> list[int]:
        """Those whose save was completed, oldest first; their content is not verified."""
        return [step for step, complete in self._all() if complete]

    def choose(self, step: int | None, only: str | None) -> record.Record:
        """Returns the record of `step`, or of the newest that is intact in the part `only`."""
        found = distributed.agree("checkpoint", lambda: self._find(step, only), self._timeout_s)
        return record.read(self.folder(found))

    def check_writable(self) -> None:
        """Raises UserError on every process if an object store does not take writes."""
        check = address.check_writable
        distributed.agree("checkpoint", lambda: check(self.directory), self._timeout_s)

    def check_records(self, save_every_steps: int) -> None:
        """Raises UserError on every process if all checkpoints have lost their record.

        A first save that was interrupted has none either; it is named in a warning.
        """
        distributed.agree(
            "checkpoint", lambda: self._check_records(save_every_steps), self._timeout_s
        )

    def make_room(self, step: int) -> None:
        """Sweeps once, and removes what a damaged save left at this step."""
        if not self._swept:
            if address.is_local(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            address.check_writable(self.directory)
            self.sweep()
            self._swept = True
        if self.folder(step).exists():
            self._remove(step)

    def sweep(self) -> None:
        """Removes what interrupted and failed saves left."""
        for path in self._entries():
            if "orbax-checkpoint-tmp" in path.name:
                path.rmtree()
        for found, complete in self._all():
            if not complete:
                self.folder(found).rmtree()

    def prune(self, newest: int, keep_last: int, keep_every_steps: int) -> None:
        """Applies the keep rules after `newest` was saved."""
        self._damaged.discard(newest)
        # Steps after this one are of a life that was rolled back: training will overwrite them.
        steps = [s for s in self.completed() if s <= newest and s not in self._damaged]
        every = keep_every_steps
        kept = steps[-keep_last:] + [s for s in steps if every and s % every == 0]
        for old in {*steps, *self._damaged} - {*kept}:
            self._remove(old)
            self._damaged.discard(old)

    def _check_records(self, save_every_steps: int) -> None:
        found = self._all()
        if not found or any(complete for _, complete in found):
            return
        newest = self.folder(found[-1][0])
        # Before a second save begins, or one of a later step, the first is complete.
        if len(found) > 1 or found[-1][0] > save_every_steps:
            raise UserError(
                f"no checkpoint in {self.directory} has its {record.RECORD} (newest: "
                f"{newest.name}); restore the files, remove the folders to start again, or give "
                "another --run-dir"
            )
        _warn(newest, f"its save was interrupted (no {record.RECORD}); training starts again")

    def _find(self, step: int | None, only: str | None) -> int:
        found = self._all()
        if step is not None:
            if step not in [at for at, _ in found]:
                has = ", ".join(str(at) for at, complete in found if complete) or "none"
                raise UserError(f"no checkpoint of step {step} in {self.directory}; it has {has}")
            if damage := self._damage(step, only):
                raise UserError(f"checkpoint {self.folder(step)} cannot be used: {damage}")
            return step
        rejected = []
        for candidate, complete in reversed(found):
            damage = self._damage(candidate, only)
            if damage is None:
                return candidate
            _warn(self.folder(candidate), damage)
            rejected.append(f"{candidate} ({damage})")
            if complete:
                self._damaged.add(candidate)
        if rejected:
            raise UserError(
                f"no checkpoint in {self.directory} can be used: {'; '.join(rejected)}; "
                "restore the files, or start in another run directory"
            )
        raise UserError(f"no checkpoint in {self.directory}; train first, or name another folder")

    def _damage(self, step: int, only: str | None) -> str | None:
        folder = self.folder(step)
        if self._verified & {(step, only), (step, None)}:
            return None
        try:
            record.verify(folder, record.read(folder), only)
        except record.Damaged as damage:
            return str(damage)
        self._verified.add((step, only))
        return None

    def _all(self) -> list[tuple[int, bool]]:
        """Every step there is, oldest first, and whether its save was completed."""
        with address.reaching(self.directory):
            steps = sorted(int(path.name) for path in self._entries() if path.name.isdecimal())
            return [(step, (self.folder(step) / record.RECORD).exists()) for step in steps]

    def _entries(self) -> list[epath.Path]:
        return list(self.directory.iterdir()) if self.directory.exists() else []

    def _remove(self, step: int) -> None:
        folder = self.folder(step)
        self._verified = {key for key in self._verified if key[0] != step}
        # The record first: a folder that is half removed must not look complete.
        (folder / record.RECORD).unlink(missing_ok=True)
        folder.rmtree()


def _warn(folder: epath.Path, damage: str) -> None:
    print(
        f"jaxgen: warning: checkpoint {folder} is not used: {damage}", file=sys.stderr, flush=True
    )
