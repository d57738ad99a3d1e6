"""What `jaxgen data pack` and `jaxgen data show` print."""

import itertools

import numpy as np

from jaxgen.data.config import DataConfig
from jaxgen.data.dataset import PackedData, prepare
from jaxgen.data.loader import Loader
from jaxgen.data.rows import MASKED_FORMAT, SPLITS
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.ranges import MAX_INT


def pack(config: DataConfig, seq_len: int) -> str:
    """Packs what is not packed yet; returns a summary of each source's manifest."""
    return summary(prepare(config, seq_len))


def summary(packed: PackedData) -> str:
    """Returns what was packed and where it lies, as text."""
    lines = [
        f"tokenizer  {packed.tokenizer.vocab_size} tokens, {packed.tokenizer.fingerprint[:12]}"
    ]
    total = sum(source.weight for source in packed.config.sources)
    for source, folder, manifest in zip(
        packed.config.sources, packed.folders, packed.manifests, strict=True
    ):
        lines += [
            f"{source.kind}  {manifest.source}  {source.weight / total:.1%} of the rows",
            f"  folder   {folder}",
            f"  read     {manifest.files:,} files, {manifest.documents:,} documents; left out "
            f"{manifest.undecodable:,} not UTF-8, {manifest.empty:,} empty",
        ]
        if manifest.format == MASKED_FORMAT:
            lines.append(
                f"           {manifest.cut:,} longer than a row, which end with it; left out "
                f"{manifest.unanswered:,} without an answer in it"
            )
        lines += [f"           not UTF-8: {example}" for example in manifest.undecodable_examples]
        for split in SPLITS:
            info = getattr(manifest, split)
            filled = info.tokens / max(info.rows * manifest.seq_len, 1)
            lines.append(
                f"  {split:<9}{info.rows:,} rows of {manifest.seq_len}, {info.tokens:,} tokens "
                f"({filled:.1%} of the rows), {info.targets:,} of them count, "
                f"{info.text_bytes:,} bytes of text"
            )
    return "\n".join(lines)


def show(
    config: DataConfig, seq_len: int, batch_size: int, step: int, max_rows: int | None = None
) -> str:
    """Returns the batch of a step as the model sees it: its rows, their documents, their text.

    Of conversations, what the model learns to say stands between ⟦ and ⟧.

    Args:
        config: the data of the run.
        seq_len: tokens a row.
        batch_size: global rows a step.
        step: as in metrics.jsonl, where the first is 1; the loader's is one less.
        max_rows: how many rows to show; None for all.

    Raises:
        UserError: no run has such a step.
    """
    if not 1 <= step <= MAX_INT:
        raise UserError(f"--step {step}; use a number from 1 to {MAX_INT}")
    packed = prepare(config, seq_len)
    loader = Loader(packed, batch_size)
    batch, (sources, indices) = loader.host_batch(step - 1), loader.locate(step - 1)
    shown = batch_size if max_rows is None else min(max_rows, batch_size)
    lines = [
        f"step {step}: {batch_size} rows of {seq_len} tokens; {int(batch.weights.sum())} targets, "
        f"{int((batch.segments == 0).sum())} tokens of padding; {shown} rows shown"
    ]
    for row in range(shown):
        name = packed.manifests[sources[row]].source
        segments = batch.segments[row]
        lines.append(f"=== row {row}: row {indices[row]} of {name}, {segments.max()} documents")
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            tokens, targets = batch.tokens[row, own].tolist(), int(batch.weights[row, own].sum())
            lines.append(f"--- document {segment}: {len(tokens)} tokens, {targets} targets")
            text = packed.tokenizer.decode(tokens, special=True)
            if targets < len(tokens) - 1:
                text = _mark(packed.tokenizer, tokens, np.asarray(batch.weights[row, own][:-1]) > 0)
            lines.append(text)
        if (segments == 0).any():
            lines.append(f"--- padding: {int((segments == 0).sum())} tokens")
    return "\n".join(lines)


def _mark(tokenizer: Tokenizer, tokens: list[int], counted: np.ndarray) -> str:
    """Returns text in which those tokens stand between marks that `counted`, from the second, says.

    A character whose bytes are several tokens is whole, for it counts as a whole.
    """
    parts = []
    for marked, run in itertools.groupby(
        zip([False, *counted], tokens, strict=True), lambda x: x[0]
    ):
        text = tokenizer.decode([token for _, token in run], special=True)
        parts.append(f"\u27e6{text}\u27e7" if marked else text)
    return "".join(parts)
