"""Lightning indexer: which entries a CSA query attends to (reference B.7, B.8, paper 2.3.1)."""

# Legend: B rows, T tokens, D hidden, J indexer heads, L indexer head dim, E entries, N chosen
# entries
from __future__ import annotations

from torch import Tensor, nn

from model.attention.compressor import Compressor
from model.config import ModelConfig
from model.context import RopeTable
from model.kernels.select import select
from model.linear import ActivationCast, Linear


class LightningIndexer(nn.Module):
    """Scores ``I[t, i] = sum_h w[t, h] relu(q[t, h] . k[i])`` over the compressed entries.

    Its inputs are detached: the LM loss never reaches it, and its own loss never reaches the model.
    Without quantisation the two Hadamard transforms of the released code cancel; a quantising cast
    brings them in.

    Args:
        config: the model.
        ratio: tokens per entry.
    """

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, ratio, self.dim, overlap=True)
        self.q_cast = ActivationCast()
        self._rope = select("rope", config.kernels)

    def forward(
        self, u_BTD: Tensor, q_latent_BTQ: Tensor, rope: RopeTable
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, J, L] and head weights [B, T, J] with both factors.

        Their keys are the entries of :attr:`compressor`.
        """
        B, T, _ = u_BTD.shape
        q_BTJL = self.wq_b(q_latent_BTQ.detach()).view(B, T, self.heads, self.dim)
        q_BTJL = self.q_cast(self._rope(q_BTJL, *rope))
        w_BTJ = self.weights_proj(u_BTD.detach()).float()
        return q_BTJL, w_BTJ * (self.dim * self.heads) ** -0.5
