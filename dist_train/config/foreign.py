"""Names that people know from other tools, and the key to use here."""

from __future__ import annotations

# What people write elsewhere, and the key to use here. {value} is what they wrote, where it is a plain number or word.
_ANSWERS = (
    ("epochs max_epochs num_epochs num_train_epochs n_epochs", "the number of epochs is trainer.duration={value}ep"),
    ("max_steps num_steps total_steps", "the number of steps is trainer.duration={value}step"),
    ("max_time max_duration", "the length of training is trainer.duration, like 20ep, 500step or 2h"),
    (
        "batch_size train_batch_size",
        "data.global_batch_size is the samples of a step over all ranks; trainer.micro_batch_size those of one forward",
    ),
    (
        "per_device_train_batch_size train_micro_batch_size_per_gpu per_gpu_batch_size batch_size_per_gpu",
        "it is trainer.micro_batch_size={value}; data.global_batch_size stays the same on any number of ranks",
    ),
    ("per_device_eval_batch_size val_batch_size test_batch_size", "it is data.eval_batch_size={value}"),
    (
        "accumulate_grad_batches gradient_accumulation_steps grad_accum_steps accumulation_steps",
        "accumulation follows from data.global_batch_size, the number of ranks and trainer.micro_batch_size",
    ),
    (
        "gradient_clip_val max_grad_norm clip_grad grad_clip gradient_clip_norm max_norm",
        "it is trainer.clip_grad_norm={value} (or trainer.clip_grad_value)",
    ),
    (
        "devices gpus num_gpus n_gpus num_nodes nproc_per_node num_processes world_size",
        "the number of processes is torchrun's: torchrun --nproc_per_node=4 -m dist_train.main ...",
    ),
    ("accelerator use_cuda no_cuda", "it is distributed.device: auto, cpu or cuda"),
    ("amp use_amp fp16 bf16 mixed_precision autocast dtype", "it is trainer.precision: auto, fp32, bf16 or fp16"),
    ("lr learning_rate", "it is optimizer.lr={value}"),
    ("momentum weight_decay betas", "it is an argument of the optimizer: optimizer.{key}={value}"),
    ("lr_scheduler scheduler_type", "it is the component `scheduler`"),
    ("criterion loss_fn loss_function", "it is the component `loss`"),
    ("net network arch", "it is the component `model`"),
    (
        "pretrained init_from load_from",
        "weights to begin from are transfer.weights: a file, a run's directory or a torchvision name",
    ),
    ("num_classes n_classes", "it is transfer.head={value}, or an argument of the model"),
    ("dataset train_dataset trainset", "it is the component data.train"),
    ("eval_dataset val_dataset valset", "it is the component data.val"),
    ("transform transforms", "it is an argument of the dataset, as data.train.transform"),
    (
        "ckpt_path resume_from resume_from_checkpoint checkpoint_path resume",
        "a run goes on by itself when the same command is run again; checkpoint.resume=PATH begins from another one",
    ),
    ("early_stopping early_stop patience", "it is trainer.stop_when: {metric: val/loss, patience: 5ep}"),
    ("ema use_ema", "it is trainer.ema_decay, for example 0.999"),
    ("save_top_k save_total_limit", "it is checkpoint.keep_last, and checkpoint.keep_best"),
    ("save_every save_steps save_interval every_n_epochs", "it is checkpoint.every, like 1ep or 15min"),
    (
        "val_check_interval check_val_every_n_epoch eval_steps eval_every eval_interval",
        "it is trainer.evaluate_every, like 1ep or 500step",
    ),
    ("log_every_n_steps logging_steps log_interval print_freq", "it is trainer.log_every={value}step"),
    ("output_dir save_dir log_dir logdir default_root_dir", "it is run.dir={value}"),
    ("name run_name experiment exp_name experiment_name", "it is run.name={value}"),
    ("backend dist_backend", "the backend follows from distributed.device: nccl on CUDA, gloo on CPU"),
    ("workers dataloader_num_workers n_workers", "it is data.num_workers={value}"),
    ("random_seed", "it is seed={value}"),
    ("sync_bn", "it is distributed.sync_batchnorm={value}"),
    ("<<", "merge keys aren't part of YAML 1.2; use `extends: base.yaml`, or write the keys out"),
    ("multiprocessing_context start_method", "it is data.worker_start_method={value}"),
)
FOREIGN = {name: answer for names, answer in _ANSWERS for name in names.split()}

# Values that people write elsewhere, and the word for them here.
_SYNONYMS = {
    "fp32": "float32 32 32-true full",
    "bf16": "bfloat16 bf16-mixed bf16-true",
    "fp16": "float16 half 16 16-mixed 16-true",
    "cuda": "gpu nvidia cuda:0",
    "min": "minimize minimum lower",
    "max": "maximize maximum higher",
    "true": "yes y on",
    "false": "no n off",
    "null": "none nil",
}
SYNONYMS = {name: word for word, names in _SYNONYMS.items() for name in names.split()}


def example_of(answer: str) -> str:
    """An answer of FOREIGN with an example for the value."""
    answer = answer.replace("{value}ep", "20ep").replace("{value}step", "500step")
    return answer.replace("={value}", "").replace("{key}", "...")
