"""DeepSeekV4: embedding, blocks over the streams, head, MTP and all losses (reference B.1).

Single-device PyTorch. The pieces (:meth:`embed_tokens`, the blocks, :meth:`collapse`,
:meth:`losses`) are separate so that a pipeline stage can hold some of them.
"""

# Legend: B rows, T tokens, S streams, D hidden, V vocabulary, K prediction depths
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.block import Aux, Block
from model.config import IndexerPhase, ModelConfig, Residual
from model.context import ForwardContext, build_context
from model.hyper_connections import HyperHead, PlainHead
from model.kernels.select import select
from model.kv_exchange import KVExchange, WholeRows
from model.linear import Linear
from model.loss import ModelOutput, Objective, cross_entropy_sum, project, tensor_float_32
from model.mtp import MTPBlock
from model.norm import RMSNorm


class DeepSeekV4(nn.Module):
    """The whole model; parameters are created uninitialised, see ``model/init.py``.

    Args:
        config: sizes and switches; validated here.

    Attributes:
        compute_dtype: dtype of the streams and of most matmuls; parameters stay fp32 masters.
        head_dtype: operands of the head's products; the logits are fp32 either way.
        head_tf32: CUDA multiplies them as TF32, where they are fp32.
        yarn: whether compressed layers use YaRN now (``yarn_from_seq_len`` delays it).
        kv_exchange: what an objective's passes take of the rows (:meth:`forward`): all, or a shard;
            passes for logits take whole rows.

    Raises:
        ValueError: a config that cannot be.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.compute_dtype = torch.float32
        self.head_dtype, self.head_tf32 = torch.float32, False
        self.yarn = True
        self.kv_exchange: KVExchange = WholeRows()
        self.embed = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleDict(
            {
                str(i): Block(
                    config, config.kind(i), config.ratio(i), config.router(i), f"layers.{i}"
                )
                for i in range(config.num_hidden_layers)
            }
        )
        self.hc_head = (
            HyperHead(config) if Residual(config.residual) is Residual.mhc else PlainHead()
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self._cross_entropy = select("cross_entropy", config.kernels)
        self.mtp = nn.ModuleDict(
            {str(k): MTPBlock(config, f"mtp.{k}") for k in range(config.num_nextn_predict_layers)}
        )

    # ---- pieces ----------------------------------------------------------------------------------
    def embed_tokens(self, ids_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D] in the compute dtype."""
        return self.embed(ids_BT).to(self.compute_dtype)

    def streams(self, ids_BT: Tensor) -> Tensor:
        """The embedding repeated on every stream [B, T, S, D]."""
        x_BTD = self.embed_tokens(ids_BT)
        return x_BTD.unsqueeze(2).repeat(1, 1, self.config.num_streams, 1)

    def context(
        self,
        document_ids_BT: Tensor,
        kv_exchange: KVExchange = WholeRows(),  # noqa: B008  has no state
    ) -> ForwardContext:
        """Plan and tables of a batch.

        Args:
            document_ids_BT: as in :meth:`forward`.
            kv_exchange: says what is here of the rows; by default they are whole.
        """
        device = next(self.parameters()).device
        return build_context(self.config, document_ids_BT, self.yarn, device, kv_exchange)

    def training_context(self, document_ids_BT: Tensor, objective: Objective) -> ForwardContext:
        """The same of what is here of the rows, with what an objective asks of the layers."""
        context = self.context(document_ids_BT, self.kv_exchange)
        context.phase = IndexerPhase(objective.indexer_phase)
        context.indexer_loss = objective.indexer_weight != 0
        context.balance_loss = objective.balance_weight != 0
        context.monitors = objective.monitors
        context.replay = objective.replay or {}
        context.record = objective.record
        return context

    def trunk(
        self, x_BTSD: Tensor, input_ids_BT: Tensor, context: ForwardContext
    ) -> tuple[Tensor, list[Aux]]:
        """All main blocks; side results of each."""
        results: list[Aux] = []
        for block in self.layers.values():
            x_BTSD, aux = block(x_BTSD, input_ids_BT, context)
            results.append(aux)
        return x_BTSD, results

    def collapse(self, x_BTSD: Tensor) -> Tensor:
        """Streams to the normalised input of the head [B, T, D]."""
        return self.norm(self.hc_head(x_BTSD))

    def predict_ahead(
        self, x_BTSD: Tensor, next_ids_BTK: Tensor, context: ForwardContext
    ) -> tuple[list[Tensor], list[Aux]]:
        """Run the MTP chain.

        Args:
            x_BTSD: streams of the main model before its hc_head.
            next_ids_BTK: the token 1 + k places ahead of each position; anything where there is
                none.
            context: shared by all layers.

        Returns:
            For every depth the head's input [B, T, D], and the side results.
        """
        outputs, results = [], []
        for k, block in enumerate(self.mtp.values()):
            assert isinstance(block, MTPBlock)
            next_ids_BT = next_ids_BTK[..., k].clamp(min=0)
            x_BTSD, h_BTD, aux = block.predict(
                x_BTSD, self.embed_tokens(next_ids_BT), next_ids_BT, context
            )
            outputs.append(h_BTD)
            results.append(aux)
        return outputs, results

    # ---- whole passes ----------------------------------------------------------------------------
    def forward(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor,
        labels_BTK: Tensor,
        objective: Objective,
    ) -> ModelOutput:
        """One microbatch's share of the objective.

        Args:
            input_ids_BT: token ids; of a shard of the rows where ``kv_exchange`` says so, as are
                the labels.
            document_ids_BT: of whole rows: equal inside a document, -1 for padding; best on the
                host.
            labels_BTK: the token 1 + k places ahead, negative where there is none.
            objective: weights and the normalisers of the whole global batch.
        """
        context = self.training_context(document_ids_BT, objective)
        x_BTSD, results = self.trunk(self.streams(input_ids_BT), input_ids_BT, context)
        h_BTD = self.collapse(x_BTSD)
        ahead, mtp_results = [], []
        if objective.mtp_weight:
            ahead, mtp_results = self.predict_ahead(x_BTSD, labels_BTK, context)
        if not objective.losses:
            return ModelOutput(torch.zeros((), device=h_BTD.device), {}, {}, {})
        return self.losses([h_BTD, *ahead], labels_BTK, results + mtp_results, objective)

    def losses(
        self, h_KBTD: list[Tensor], labels_BTK: Tensor, results: list[Aux], objective: Objective
    ) -> ModelOutput:
        """Put the objective together: of a part of the model, that part's share.

        Args:
            h_KBTD: the head's input for the main prediction and every MTP depth; empty where the
                head lives elsewhere.
            labels_BTK: labels of each.
            results: side results of the blocks that are here.
            objective: weights and normalisers.
        """
        by_depth = [
            cross_entropy_sum(
                h.flatten(0, 1),
                self.head.weight,
                labels_BTK[..., k].flatten(),
                self.config.loss_chunk_tokens,
                self.head_dtype,
                self._cross_entropy,
                self.head_tf32,
            )
            / max(objective.targets_K[k], 1)
            for k, h in enumerate(h_KBTD)
        ]
        zero = torch.zeros((), device=labels_BTK.device)
        loss = by_depth[0] if by_depth else zero
        loss_mtp = sum(by_depth[1:], zero) / max(len(by_depth) - 1, 1)
        kl = [aux["indexer_kl"] / objective.tokens for aux in results if "indexer_kl" in aux]
        balance = [aux["balance"] / objective.tokens for aux in results if "balance" in aux]
        total = (
            loss
            + objective.mtp_weight * loss_mtp
            + objective.indexer_weight * sum(kl, zero)
            + objective.balance_weight * sum(balance, zero)
        )
        losses = {
            "loss": loss,
            "loss_mtp": loss_mtp,
            "loss_indexer": sum(kl, zero) / max(self.config.num_indexers, 1),
            "loss_balance": sum(balance, zero) / max(self._num_balanced(objective), 1),
        }
        return ModelOutput(
            total=total,
            losses={name: value.detach() for name, value in losses.items()},
            expert_load={
                k.removeprefix("load:"): v
                for aux in results
                for k, v in aux.items()
                if k[:5] == "load:"
            },
            monitors=_add_up(results),
        )

    def _num_balanced(self, objective: Objective) -> int:
        """Learned gates of the whole model that run under an objective."""
        left_out = 0 if objective.mtp_weight else self.config.num_nextn_predict_layers
        return self.config.num_learned_gates - left_out

    def logits(self, input_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V] in fp32.

        Args:
            input_ids_BT: token ids.
            document_ids_BT: as in :meth:`forward`; None: every row is one document.
        """
        context = self.context(_documents(input_ids_BT, document_ids_BT))
        x_BTSD, _ = self.trunk(self.streams(input_ids_BT), input_ids_BT, context)
        return self.project(self.collapse(x_BTSD))

    def mtp_logits(
        self, input_ids_BT: Tensor, document_ids_BT: Tensor | None = None
    ) -> list[Tensor]:
        """Logits of every MTP depth: depth k at position t predicts token t + 2 + k.

        Positions whose look-ahead leaves the row use token 0 there and mean nothing.
        """
        context = self.context(_documents(input_ids_BT, document_ids_BT))
        x_BTSD, _ = self.trunk(self.streams(input_ids_BT), input_ids_BT, context)
        ahead = [F.pad(input_ids_BT[:, 1 + k :], (0, 1 + k)) for k in range(len(self.mtp))]
        if not ahead:
            return []
        outputs, _ = self.predict_ahead(x_BTSD, torch.stack(ahead, dim=-1), context)
        return [self.project(h_BTD) for h_BTD in outputs]

    def project(self, h_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] in fp32 of the head's input."""
        with tensor_float_32(self.head_tf32):
            return project(h_BTD.to(self.head_dtype), self.head.weight.to(self.head_dtype))


def _documents(input_ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    if document_ids_BT is None:
        return torch.zeros(input_ids_BT.shape, dtype=torch.int64)
    return document_ids_BT


def _add_up(results: list[Aux]) -> dict[str, Tensor]:
    """Monitors summed over blocks."""
    total: dict[str, Tensor] = {}
    for aux in results:
        for key, value in aux.items():
            if key.endswith((".sum", ".count")):
                total[key] = total[key] + value if key in total else value
    return total
