"""Publishing a converted folder on a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import hub
from ._card import folder_card, stated_licence, states_base, written_by_us
from ._hashing import sha256
from ._verify import verify
from .checkpoint.files import read_json
from .checkpoint.output import CARD, EVALUATION, REPORT, replace_file
from .errors import HubError, UsageError, VerificationError
from .hub.repository import RemoteFile, check_name
from .hub.target import open_target, target_of

# What hubs put into a new repository themselves, and what may have been measured or written anew.
_REPLACED = (".gitattributes", ".gitignore", "configuration.json", CARD, EVALUATION)


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        ref: where.
        page: its address; None where nothing was uploaded.
        commit: what was made there.
        card: the text of the model card.
        files: bytes by name.
        notes: what to know, as sentences.
    """

    ref: hub.Ref
    page: str | None
    commit: str | None
    card: str
    files: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())


def publish(
    out: str | os.PathLike[str],
    to: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Publication:
    """Verify the folder `out`, write its model card, upload it, and compare the hashes of what the hub then has.

    What an interrupted run has uploaded is not sent again. A card that somebody has edited is published as it is.

    Args:
        out: what `glmquant.convert` wrote.
        to: ``hf:org/name`` or ``ms:org/name``; created if it is not there.
        private: only for the owner to see.
        dry_run: verify and make the card, upload nothing and write nothing.
        endpoint: the hub's address, for a mirror.
        token: instead of the one that the client has stored.
        progress: of the verification; see `glmquant.verify`.

    Raises:
        UsageError: `to` is no place to publish, or `out` nothing that glmquant wrote.
        VerificationError: the folder is damaged.
        HubError: the hub does not take it, or holds something else.
    """
    ref = target_of(to)
    folder = Path(out).expanduser()
    if not (folder / REPORT).is_file():
        raise UsageError(
            f"{folder} was not written by glmquant (it has no {REPORT}); publish what convert wrote."
        )
    found = verify(folder, progress=progress)
    if not found.ok:
        more = (
            f" And {len(found.problems) - 1} more; see `glmquant verify`." if len(found.problems) > 1 else ""
        )
        raise VerificationError(f"{folder} is not published: {found.problems[0]}{more}")
    report = read_json(folder / REPORT)
    ours = written_by_us(folder)
    card = folder_card(folder, ref.hub, ref.name) if ours else (folder / CARD).read_bytes()
    names = sorted(
        {*report["files"], REPORT, CARD, *([EVALUATION] if (folder / EVALUATION).is_file() else [])}
    )
    for name in names:
        check_name(name, folder / REPORT, "nothing was published")
    sizes = {name: len(card) if name == CARD else (folder / name).stat().st_size for name in names}
    notes = list(_notes(folder, names, ours))
    if ours and not states_base(report, ref.hub):
        notes.append(
            f"the card names no base_model, because SOURCE was not on this hub; add it to {CARD} if you know it"
        )
    if dry_run:
        notes.append(f"if {ref} holds another {CARD} already, this one replaces it")
        return Publication(ref, None, None, card.decode(errors="replace"), sizes, tuple(notes))
    target = open_target(ref, endpoint, token)
    if ours:
        replace_file(folder / CARD, card)
    target.create(private, stated_licence(report))
    if target.is_private() != private:
        if private:
            raise HubError(f"{target.page} is there already and everybody can see it; choose another name.")
        notes.append(f"{target.page} is private; make it public there when it is to be")
    hashes = {name: str(entry["sha256"]) for name, entry in report["files"].items()}
    hashes.update({name: sha256(folder / name) for name in names if name not in hashes})
    before = target.files()
    _refuse_others(before, folder, hashes, f"{target.page}")
    if CARD in before and not _same(before[CARD], folder / CARD, hashes[CARD]):
        notes.append(f"the {CARD} that {target.page} held was replaced")
    missing = [name for name in names if not _same(before.get(name), folder / name, hashes[name])]
    commit = target.upload(folder, missing) if missing else None
    after = target.files()
    wrong = [name for name in names if not _same(after.get(name), folder / name, hashes[name])]
    if wrong:
        raise HubError(
            f"{target.page} holds another {wrong[0]} than was uploaded, or none ({len(wrong)} files in all); "
            "run the same command again."
        )
    return Publication(ref, target.page, commit, card.decode(errors="replace"), sizes, tuple(notes))


def _notes(folder: Path, names: list[str], ours: bool) -> Iterator[str]:
    if not ours:
        yield f"{CARD} has been edited and is published as it is"
    left = sorted(path.name for path in folder.iterdir() if path.name not in names)
    if left:
        yield f"glmquant did not write {', '.join(left)}: not published"


def _same(remote: RemoteFile | None, path: Path, digest: str) -> bool:
    """Whether a file on a hub is the one here."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == digest
    return remote.blob_id is not None and remote.matches(path)


def _refuse_others(
    before: Mapping[str, RemoteFile], folder: Path, hashes: Mapping[str, str], page: str
) -> None:
    for name, remote in before.items():
        known = name in hashes and _same(remote, folder / name, hashes[name])
        if not known and name not in _REPLACED:
            raise HubError(
                f"{page} already holds {name}, which is not what is to be published; choose another name, or delete "
                "that repository first."
            )
