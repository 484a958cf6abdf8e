"""What people type, and what it is called here. One table; each line says what to type instead."""

from __future__ import annotations

# Keys of other trainers, and of guesses. The first word of a line is the key that is meant.
_KEYS: dict[str, tuple[str, ...]] = {
    "optim.lr": ("lr", "learning_rate", "train.lr", "train.learning_rate", "optim.learning_rate"),
    "train.steps": ("steps", "max_steps", "train.max_steps", "num_steps", "iterations",
                    "train.iters", "max_iters"),
    "train.seq_len": ("seq_len", "seq_length", "context_length", "block_size", "max_seq_len",
                      "train.seq_length", "train.context_length", "data.seq_len", "model.seq_len"),
    "train.global_batch_tokens (tokens) and train.micro_batch_size (rows of a forward pass)": (
        "batch_size", "train.batch_size", "global_batch_size", "train.global_batch_size",
        "gradient_accumulation_steps", "train.gradient_accumulation_steps", "train.grad_accum"),
    "train.micro_batch_size": ("micro_batch_size", "per_device_train_batch_size", "mbs"),
    "train.precision": ("precision", "dtype", "train.dtype", "bf16", "fp16", "train.bf16", "amp",
                        "mixed_precision"),
    "train.device": ("device", "cuda", "gpu", "train.gpu"),
    "train.eval_every": ("eval_every", "eval_interval", "train.eval_interval", "eval_steps"),
    "train.checkpoint_every": ("save_every", "save_steps", "checkpoint_every", "save_interval",
                               "train.save_every", "train.save_interval", "train.save_steps"),
    "train.log_every": ("log_every", "logging_steps", "log_interval", "train.log_interval"),
    "train.eval_only=true": ("eval_only", "evaluate", "train.evaluate"),
    "train.activation_checkpoint=block": ("gradient_checkpointing", "activation_checkpointing",
                                          "train.gradient_checkpointing"),
    "train.time_limit_seconds": ("time_limit", "train.time_limit", "max_time"),
    "train.ema_decay": ("ema", "train.ema", "ema_decay"),
    "optim.schedule.warmup_steps": ("warmup", "warmup_steps", "train.warmup_steps",
                                    "optim.warmup_steps", "train.warmup"),
    "optim.grad_clip": ("grad_clip", "clip", "max_grad_norm", "train.grad_clip",
                        "train.max_grad_norm"),
    "optim.muon.weight_decay and optim.adamw.weight_decay": (
        "weight_decay", "train.weight_decay", "optim.weight_decay"),
    "optim=adamw (or muon)": ("optimizer", "optimiser", "train.optimizer", "optim.optimizer"),
    "model.residual=plain": ("model.mhc", "mhc", "model.hyper_connections", "model.hc"),
    "model.num_nextn_predict_layers": ("mtp", "model.mtp", "model.mtp_depth", "num_mtp"),
    "model.n_routed_experts": ("experts", "num_experts", "model.experts", "model.num_experts"),
    "model.num_experts_per_tok": ("top_k", "model.top_k", "model.moe_top_k"),
    "model.num_hidden_layers": ("layers", "num_layers", "n_layers", "model.layers",
                                "model.num_layers", "model.n_layers"),
    "model.hidden_size": ("hidden_size", "d_model", "model.dim", "model.d_model", "model.width"),
    "quant=fp4_qat (or fp8, deployed)": ("fp4", "fp8", "qat", "quant.fp4", "train.quant",
                                         "quantization"),
    "parallel.pp": ("pp", "pipeline", "parallel.pipeline"),
    "parallel.ep": ("ep", "expert_parallel", "parallel.expert"),
    "parallel.dp_shard": ("dp", "fsdp", "world_size", "parallel.dp", "parallel.fsdp", "num_gpus"),
    "wandb.mode=offline (or online)": ("wandb", "use_wandb", "train.wandb", "wandb.enabled",
                                       "report_to"),
    "data=text data.sources.text.path=PATH (or data=jsonl, parquet, hub: v4 pretrain --help)": (
        "data.path", "data.dir", "data.file", "data.files", "data_path", "dataset", "data_dir",
        "data.name", "data.dataset", "data.train", "data.source", "train.data"),
    "data.tokenizer": ("tokenizer", "model.tokenizer", "train.tokenizer", "data.tokenizer_path"),
    "data.vocab_size (of a tokenizer trained here) and model.vocab_size": ("vocab_size", "vocab"),
    "data.workers": ("workers", "num_workers", "train.num_workers", "data.num_workers"),
    "sample.prompt": ("prompt", "train.prompt"),
    "run_dir=FOLDER": ("output_dir", "out_dir", "output", "out", "name", "run_name", "save_dir",
                       "train.output_dir", "checkpoint_dir", "log_dir"),
    "init_from=RUN": ("load", "checkpoint", "pretrained", "load_from", "init", "model.path",
                      "train.init_from", "finetune_from"),
    "train.steps; an epoch is tokens of the data / train.global_batch_tokens, which dry_run=true"
    " tells": ("epochs", "num_epochs", "train.epochs", "train.num_epochs", "max_epochs"),
    "run_dir of the run: the same command goes on by itself": (
        "resume", "train.resume", "resume_from", "resume_from_checkpoint", "continue"),
    "model.kernels": ("kernels", "flash_attention"),
    "model.deterministic": ("deterministic", "train.deterministic", "deterministic_mode",
                            "use_deterministic_algorithms", "cudnn_deterministic"),
    "train.compile": ("compile", "torch_compile", "model.compile"),
    "dry_run=true": ("train.dry_run", "dryrun", "plan"),
}  # fmt: skip
KEYS = {typed: meant for meant, some in _KEYS.items() for typed in some}

FLAGS = {
    "--dry-run": "dry_run=true",
    "--dry_run": "dry_run=true",
    "--plan": "dry_run=true, or v4 plan",
    "--resume": "run_dir of the run: the same command goes on by itself",
    "--continue": "run_dir of the run: the same command goes on by itself",
    "--config": "experiment=NAME, or KEY=VALUE",
    "--wandb": "wandb.mode=online",
    "--debug": "experiment=debug_cpu",
    "--eval": "train.eval_only=true",
}


def meant_by_key(key: str) -> str | None:
    """What a key that is none of ours means, as one types it; None: nobody knows."""
    return KEYS.get(key.lower().replace("-", "_"))


def meant_by_flag(flag: str) -> str | None:
    """What a flag that is none of ours means: ``--lr`` and ``--train.lr`` are keys with dashes."""
    if flag in FLAGS:
        return FLAGS[flag]
    return meant_by_key(flag.lstrip("-"))
