"""Global batches of packed documents, the same for every layout, and resuming among them.

Life of a token: a source gives documents, a store holds their ids (data/prepare.py), a pool draws
documents (data/mixture.py), packing cuts and places them into rows (data/packing.py), the rows of a
pool are shuffled by its key (data/position.py), and :meth:`Loader.plan` takes them in that order.
A thread draws the pool that comes next (data/pools_ahead.py).

The position is (epoch, pool, row), and where the sources stood before the pool. It depends
neither on how many rows a step takes nor on ranks: every process plans the whole global batch and
reads only its own rows from disk.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig, LongDocuments, SourceKind
from data.content import sources_content, tokenizer_content
from data.epochs import most_epochs, uses
from data.errors import ConfigError
from data.global_batch import DocumentName, GlobalBatch, PackedRow, Sample, count
from data.mixture import Mixture, StoreSource, pass_tokens
from data.packing import Cut
from data.pool import Cursor, DocumentSource, Fim
from data.pools_ahead import PoolsAhead
from data.position import Position
from data.prepare import cached_stores, open_store
from data.sources import DocumentStream
from data.stream import StreamSource
from data.token_store import TokenStore
from data.tokenise import encode_validation
from data.tokenizer import Tokenizer
from data.validation import ValidationSet

VALIDATION_ROWS = 64  # rows of a validation batch
log = logging.getLogger(__name__)


class Loader:
    """Training batches from a position on, and the validation batches.

    Args:
        mixture: gives the pools.
        validation_set: held-out documents.
        tokenizer: of all ids.
        manifest: what the sample order depends on.
        num_predict_depths: K, 1 + MTP depths.
        token_counts_V: int64 [V], occurrences of each id in the training text.
        streams: the streamed sources.
        long: what becomes of documents longer than a row.
        source_tokens: training tokens of a pass over each source; None of a stream.
        weights: shares of the sources; empty: one list of all.
    """

    def __init__(
        self,
        mixture: Mixture,
        validation_set: ValidationSet,
        tokenizer: Tokenizer,
        manifest: dict[str, Any],
        num_predict_depths: int,
        token_counts_V: Tensor,
        streams: Sequence[StreamSource] = (),
        long: LongDocuments = LongDocuments.split,
        source_tokens: Mapping[str, int | None] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.source_tokens = dict(source_tokens or {})
        self.weights = dict(weights or {})
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.token_counts_V = token_counts_V
        self.position = Position(cursors=mixture.start)
        self.read_tokens = dict.fromkeys(mixture.names, 0)
        self._validation = validation_set
        self._depths = num_predict_depths
        self._streams = list(streams)
        self._long = long
        self.cut = Cut()
        self._pools = PoolsAhead(mixture, long, self._rewind)
        self._ahead: deque[tuple[GlobalBatch, dict[str, Any]]] = deque()
        self._taken: dict[str, Any] = {}  # state after the last batch taken, while some are ahead

    @property
    def stated_tokens(self) -> dict[str, int]:
        """Tokens of a pass over each stream, as its publisher says; 0 = nobody does."""
        return {stream.name: stream.stated_tokens for stream in self._streams}

    def plan(self, num_rows: int, seq_len: int) -> GlobalBatch:
        """The next rows; the position moves on.

        Args:
            num_rows: rows of the global batch.
            seq_len: tokens of a row.

        Raises:
            ValueError: below one row or one token.
        """
        if num_rows < 1 or seq_len < 1:
            raise ValueError(f"a batch of {num_rows} rows of {seq_len} tokens cannot be planned")
        if not self._ahead:
            return self._take(num_rows, seq_len)
        batch, self._taken = self._ahead.popleft()
        assert (len(batch.rows), batch.seq_len) == (num_rows, seq_len), "planned ahead otherwise"
        return batch

    def plan_ahead(self, number: int, num_rows: int, seq_len: int) -> GlobalBatch:
        """A batch to come, which :meth:`plan` gives in its turn; the position stays.

        Args:
            number: 1 is the next; the batches before it have been looked at.
            num_rows: rows of the global batch.
            seq_len: tokens of a row.
        """
        assert 1 <= number <= len(self._ahead) + 1, (number, len(self._ahead))
        if number > len(self._ahead):
            if not self._ahead:
                self._taken = self.state_dict()
            self._ahead.append((self._take(num_rows, seq_len), self._state()))
        return self._ahead[number - 1][0]

    def forget_ahead(self) -> None:
        """Plan anew what comes after the last batch that was taken."""
        if self._ahead:
            self.load_state_dict(self._taken)

    def _take(self, num_rows: int, seq_len: int) -> GlobalBatch:
        taken: list[PackedRow] = []
        barren = 0  # passes that ended without a row since the last row
        while len(taken) < num_rows:
            position = self.position.at(seq_len)
            planned = self._pools.at(position)
            if planned is None:
                barren += 1
                self._check_barren(barren, seq_len)
                self.position = position.next_epoch(self.mixture.start)
                continue
            pool, rows, cut = planned
            if position.row == 0:
                self._count_cut(cut, seq_len)
            stop = min(len(rows), position.row + num_rows - len(taken))
            taken += [PackedRow(pool, spans) for spans in rows[position.row : stop]]
            barren = 0 if rows else barren
            self._pools.draw_ahead(position)
            behind = stop == len(rows)
            self.position = (
                position.next_pool(pool.after) if behind else replace(position, row=stop)
            )
        for pool, spans in taken:
            for span in spans:
                self.read_tokens[pool.name(span.document).source] += span.length
        return GlobalBatch(
            count(taken, self._depths), taken, seq_len,
            read_tokens=dict(self.read_tokens), cut=self.cut,
        )  # fmt: skip

    def _count_cut(self, cut: Cut, seq_len: int) -> None:
        """Add up what became of long documents; the first that loses tokens is told."""
        if cut.tokens and not self.cut.tokens:
            log.warning(
                "data.packing.long_documents=%s: %d documents longer than a row of %d tokens lose"
                " %d tokens; from here on long_documents and left_out_tokens in metrics.jsonl say"
                " how many", self._long.value, cut.documents, seq_len, cut.tokens,
            )  # fmt: skip
        self.cut += cut

    def _check_barren(self, passes: int, seq_len: int) -> None:
        if passes > 1:
            raise ConfigError(
                f"data.packing.long_documents={self._long.value}: a whole pass over data.sources"
                f" gives no row of {seq_len} tokens: every document is longer, or shorter than its"
                " source's min_tokens"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position; JSON values only."""
        return self._taken if self._ahead else self._state()

    def _state(self) -> dict[str, Any]:
        p = self.position
        draws = self.mixture.draws(p.cursors)
        return {
            "epoch": p.epoch,
            "pool": p.pool,
            "row": p.row,
            "seq_len": p.seq_len,
            "earlier": [list(pair) for pair in p.earlier],
            "cursors": [list(cursor) for cursor in p.cursors],
            "read_tokens": dict(self.read_tokens),
            "cut": [self.cut.documents, self.cut.tokens],
            "streams": {
                s.name: s.state(draws[s.name], None if self.mixture.weighted else p.epoch)
                for s in self._streams
            },
        }

    def _rewind(self, position: Position) -> None:
        """Let streams be read from where a pool begins that was not the next one."""
        draws = self.mixture.draws(position.cursors)
        for source in self._streams:
            epoch = None if self.mixture.weighted else position.epoch
            source.seek(source.state(draws[source.name], epoch))

    def epochs(self, read_tokens: Mapping[str, int]) -> float | None:
        """Passes over the source passed over most often; None where no source's length is known.

        Args:
            read_tokens: of each source, as a batch tells them.
        """
        return most_epochs(uses(self.source_tokens, self.weights, read_tokens))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stood; of the same data: train/run_folder/identity.py."""
        cursors = tuple(Cursor(*map(int, cursor)) for cursor in state.get("cursors", ()))
        if not cursors and self.mixture.weighted:
            raise ConfigError(
                "data.sources: the checkpoint is of an older version, which mixed weighted sources"
                " by documents: their order cannot go on"
            )
        if not cursors:  # of code whose pools all held the same number of documents
            cursors = (Cursor(int(state["pool"]) * self.mixture.pool_documents),)
        earlier = tuple((int(length), int(rows)) for length, rows in state["earlier"])
        place = {name: int(state[name]) for name in ("epoch", "pool", "row", "seq_len")}
        self.position = Position(**place, earlier=earlier, cursors=cursors)
        read = state.get("read_tokens", {})  # older checkpoints have none
        self.read_tokens = {name: int(read.get(name, 0)) for name in self.mixture.names}
        self.cut = Cut(*map(int, state.get("cut", (0, 0))))
        self._pools.forget()
        self._ahead.clear()
        for source in self._streams:
            source.seek(state["streams"][source.name])

    def validation(self, seq_len: int, num_tokens: int = 0) -> list[GlobalBatch]:
        """Batches of up to ``VALIDATION_ROWS`` validation rows, the same at every call.

        Args:
            seq_len: tokens of a row.
            num_tokens: of all rows, padding included, rounded up to a row; 0 = the whole split.

        Returns:
            None of them where ``data.validation.bytes`` is 0.
        """
        rows = self._validation.rows(seq_len, num_tokens)
        out = []
        for start in range(0, len(rows), VALIDATION_ROWS):
            some = rows[start : start + VALIDATION_ROWS]
            packed = [PackedRow(self._validation, spans) for spans in some]
            scored = self._validation.target_bytes(some)
            out.append(GlobalBatch(count(packed, self._depths), packed, seq_len, scored))
        return out

    def validation_documents(self, most: int, min_tokens: int = 2) -> list[np.ndarray]:
        """The longest held-out documents, int64 ids, the longest first.

        Args:
            most: how many.
            min_tokens: shorter ones are left out.
        """
        return self._validation.longest(most, min_tokens)

    def validation_bytes(self, seq_len: int, num_tokens: int = 0) -> bytes:
        """The text that the targets of :meth:`validation` stand for, for other compressors.

        Its length is the sum of the batches' ``target_bytes``.
        """
        return self._validation.text(self._validation.rows(seq_len, num_tokens))

    def validation_digest(self, seq_len: int, num_tokens: int = 0) -> str:
        """Names the held-out text of :meth:`validation`: equal where the same bytes are read."""
        rows = self._validation.rows(seq_len, num_tokens)
        return hashlib.sha256(self._validation.documents_read(rows)).hexdigest()[:12]

    def validation_beginning(self, most: int) -> bytes:
        """The first bytes of the held-out text; none where none is held out.

        Args:
            most: bytes.
        """
        return self._validation.beginning(most)

    def sample_tokens(self, sample: Sample) -> np.ndarray:
        """Ids of a piece that a row held; int64. A stream is read up to it, so do not train on.

        Raises:
            ValueError: there is no such source or document.
        """
        name = DocumentName(sample.source, sample.document, sample.epoch)
        return self.mixture.document(name).tokens(0, sample.start, sample.stop)

    def token_counts(self, vocab_size: int) -> Tensor:
        """``token_counts_V`` with zeros up to a model's vocabulary; int64.

        Raises:
            ValueError: the model's vocabulary is smaller than the tokenizer's.
        """
        own = len(self.token_counts_V)
        if vocab_size < own:
            raise ConfigError(
                f"model.vocab_size={vocab_size} is smaller than the {own} ids of data.tokenizer"
            )
        return torch.nn.functional.pad(self.token_counts_V, (0, vocab_size - own))


def build_loader(
    cfg: DataConfig, tokenizer: Tokenizer, seed: int, num_predict_depths: int
) -> Loader:
    """Open every source, preparing what is not cached.

    Args:
        cfg: the ``data`` section.
        tokenizer: from ``data.prepare.build_tokenizer``.
        seed: of the run; keys the sample order.
        num_predict_depths: K, 1 + MTP depths.

    Raises:
        ValueError: a source, store or tokenizer that cannot be used; names the key.
    """
    if cfg.fim.rate > 0 and tokenizer.fim_ids is None:
        raise ConfigError(
            f"data.fim.rate={cfg.fim.rate} needs fill-in-the-middle tokens, which"
            f" data.tokenizer={cfg.tokenizer} does not have"
        )
    stores = _open_stores(cfg, tokenizer)
    streams = {
        name: StreamSource(
            name,
            DocumentStream(name, s),
            tokenizer,
            cfg.validation,
            seed,
            s.min_tokens,
            s.stated_tokens,
        )
        for name, s in cfg.named_sources().items()
        if s.streaming
    }
    mixture = Mixture(
        _sources(cfg, stores, streams, seed),
        weights_of(cfg),
        cfg.packing,
        Fim(cfg.fim.rate, tokenizer.fim_ids),
        seed,
    )
    return Loader(
        mixture,
        _validation_set(cfg, stores, streams, tokenizer),
        tokenizer,
        _manifest(cfg, stores, tokenizer, seed),
        num_predict_depths,
        torch.from_numpy(_token_counts(cfg, stores, streams)),
        list(streams.values()),
        cfg.packing.long_documents,
        {
            name: pass_tokens(stores[name].train, source) if name in stores else None
            for name, source in cfg.named_sources().items()
        },
        dict(zip(cfg.named_sources(), weights_of(cfg) or (), strict=False)),
    )


def _open_stores(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, TokenStore]:
    stores = cached_stores(cfg, tokenizer)
    for name, source in cfg.named_sources().items():
        if source.kind is not SourceKind.store:
            continue
        store = stores[name] = open_store(name, source)
        if store.manifest["tokenizer_hash"] != tokenizer.hash:
            raise ConfigError(
                f"data.sources.{name}.path={source.path} was made with tokenizer"
                f" {store.manifest['tokenizer_hash'][:12]}, data.tokenizer={cfg.tokenizer} is"
                f" {tokenizer.hash[:12]}"
            )
        if len(store.train) == 0:
            raise ConfigError(f"data.sources.{name}.path={source.path} has no training documents")
        store.check_control(tokenizer)
    return stores


def weights_of(cfg: DataConfig) -> list[float] | None:
    """Shares of the sources, in their order; None: one list of all."""
    weights = [source.weight for source in cfg.named_sources().values()]
    given = [weight for weight in weights if weight is not None]
    return given if len(given) == len(weights) and len(weights) > 1 else None


def _sources(
    cfg: DataConfig, stores: dict[str, TokenStore], streams: dict[str, StreamSource], seed: int
) -> list[DocumentSource]:
    """One for each weighted source; all stores as one where there are no weights."""
    names = list(cfg.named_sources())
    if weights_of(cfg) is None and not streams:
        parts = {name: stores[name].train for name in names}
        return [StoreSource("all", parts, seed, cfg.named_sources())]
    return [
        streams[name]
        if name in streams
        else StoreSource(name, {name: stores[name].train}, seed, {name: source})
        for name, source in cfg.named_sources().items()
    ]


def _validation_set(
    cfg: DataConfig,
    stores: dict[str, TokenStore],
    streams: dict[str, StreamSource],
    tokenizer: Tokenizer,
) -> ValidationSet:
    ids: list[np.ndarray] = []
    byte_ends: list[np.ndarray] = []
    texts: list[bytes] = []
    for name in cfg.named_sources():
        if name in streams:
            held = streams[name].validation_texts
            some_ids, some_ends = encode_validation(held, tokenizer)
            texts += [text.encode() for text in held]
        elif cfg.validation.bytes:
            documents = stores[name].validation
            length_N = documents.lengths(np.arange(len(documents))).tolist()
            some_ids = [documents.tokens(i, 0, n) for i, n in enumerate(length_N)]
            some_ends = stores[name].validation_byte_ends
            texts += stores[name].validation_text
        else:  # a store's held-out documents are not asked for
            continue
        ids += some_ids
        byte_ends += some_ends
    return ValidationSet(ids, byte_ends, texts, cfg.validation.seed)


def _manifest(
    cfg: DataConfig, stores: dict[str, TokenStore], tokenizer: Tokenizer, seed: int
) -> dict[str, Any]:
    """What the sample order depends on; JSON values."""
    return {
        "seed": seed,
        "tokenizer": tokenizer_content(tokenizer),
        "sources": sources_content(cfg, stores),
        "weights": {name: source.weight for name, source in cfg.named_sources().items()},
        "fim_rate": cfg.fim.rate,
        "packing": {**asdict(cfg.packing), "long_documents": cfg.packing.long_documents.value},
    }


def _token_counts(
    cfg: DataConfig,
    stores: dict[str, TokenStore],
    streams: dict[str, StreamSource],
) -> np.ndarray:
    """Occurrences of each id in the training text; with weights, in proportion to them."""
    names = list(cfg.named_sources())
    parts = [(streams[n] if n in streams else stores[n]).token_counts for n in names]
    counts_SV = np.stack(parts)
    weights = weights_of(cfg)
    if weights is None:
        return counts_SV.sum(axis=0)
    share_S = np.array(weights) / counts_SV.sum(axis=1) * counts_SV.sum()
    return np.rint(share_S @ counts_SV).astype(np.int64)
