"""Around the loop of the notebook: schedules, and a run's budget, folder, log, preflight, resuming and checkpoints."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data_utils import Batches, TokenData
from machinery.budget import budget_left, budget_used, seconds_between, settle_batch
from machinery.checkpoints import MOVE_AWAY, CheckpointError, Saver, check_weights, load_checkpoint, newest_checkpoint
from machinery.errors import plain_errors, told
from machinery.interrupts import StopRequest
from machinery.loggers import Loggers
from machinery.machine import Machine, compile_or_eager, left_as_it_was, measure_matmul_flops
from machinery.processes import lost_process
from machinery.run_folder import PLACES, RunFolder, describe_environment, model_code, portable
from machinery.screen import Screen, keep_printing
from machinery.tokenizers import tokenizer_to_dict
from machinery.watch import Watch, is_lost, print_ending, print_preflight, refuse_too_large, time_parts, with_best
from model_utils import check_optimizers, choose_micro_batch, count_parameters, flops_per_token, predict

# ------------------------------------------------------------------------------------------- schedules
# The factor on the peak learning rate (0 to 1), by the used fraction of the budget; so are `warmup` and `decay`.


def wsd(progress: float, warmup: float, decay: float) -> float:
    """Warm up, stay, decay linearly to zero (Hu et al. 2024, MiniCPM; Hägele et al. 2024)."""
    rise = progress / warmup if warmup else 1.0
    return min(1.0, rise, (1 - progress) / decay if decay else 1.0)


def cosine(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then half a cosine down to zero (Loshchilov & Hutter 2017). `decay` is not used."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))


def linear(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then straight down to zero (Bergsma et al. 2025). `decay` is not used."""
    return wsd(progress, warmup, 1 - warmup)


def constant(progress: float, warmup: float, decay: float) -> float:
    """Warm up and stay: for runs without a known end. `decay` is not used."""
    return wsd(progress, warmup, 0.0)


SCHEDULES = {"wsd": wsd, "cosine": cosine, "linear": linear, "constant": constant}


# ---------------------------------------------------------------------------------------------------- runs


class Run:
    """runs/<run_name> while this process trains in it, locked: what a run needs around its steps."""

    def __init__(self, config, machine: Machine) -> None:
        self.config, self.machine = settle_batch(config, machine), machine
        self.folder = RunFolder(config.runs_dir, config.run_name, writes=machine.rank == 0)
        self.loggers = Loggers()
        self.checkpoint: Path | None = None
        self._closing, self._watch, self._saver = contextlib.ExitStack(), Watch(), Saver(print)
        self._line: dict[str, float | None] = {}  # of metrics.jsonl, for the present step
        self.predicted: dict[str, float] = {}
        self._between = 0.0  # seconds that evaluations and samples add to a step
        self._repeats, self._rise, self._forecast = False, 0.0, None  # is text read again; loss over the best, at last

    def __enter__(self) -> Run:
        keep_printing()
        plain_errors()
        self.folder.lock()
        self.machine.barrier()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._closing.close()
            self.loggers.finish(None)
            if error is None:
                self.machine.barrier()  # process 0 has written everything
        except RuntimeError as gone:
            error = gone
            if not lost_process(gone):
                raise
        finally:
            self._saver.then(self.folder.unlock)
        if lost := lost_process(error):
            raise lost from None

    def check(self, model: torch.nn.Module, optimizers: list) -> None:
        """Raise `UserError` before anything is made or changed, where the newest checkpoint is of another model, a file
        cannot be written or the memory does not hold the step. `model` and `optimizers` are shapes without memory.
        """
        config = self.config
        check_optimizers(model, optimizers)
        self.machine.agree({n: v for n, v in config.to_dict().items() if n not in (*PLACES, "device")})
        measure_matmul_flops(self.machine)  # for the preflight; its matrices, up to a GB on a GPU, are not of the run
        self.machine.forget_peak()
        self._in_use, self._free = self.machine.used_memory(), self.machine.free_memory()
        self.checkpoint = newest_checkpoint(self.folder.path) if config.resume != "never" else None
        self.folder.code = model_code(model)
        if self.checkpoint:
            self.folder.compare(config.to_dict(), config.fixed)
            check_weights(self.checkpoint, model)
            self.folder.rehearse()
        asked = [config.micro_batch] * (self.machine.device.type == "cpu" and config.micro_batch != "auto")
        for size in (1, *asked):  # where a CPU has no memory, nothing is raised that could be mended
            needed = predict(model, optimizers, replace(config, micro_batch=size), self.machine, 1.0, self._in_use)
            refuse_too_large(needed, self.machine, self.folder.path)

    def resume(self, at, data: TokenData, model: torch.nn.Module, optimizers: list, scaler):
        """Bring all to where the run of this name stopped; returns `at`. Without a checkpoint its files are set aside.

        Raises `UserError` when the run was begun with another tokenizer or other text.
        """
        config, self._tokenizer = self.config, tokenizer_to_dict(data.encoding)
        self.at, self.data, self.model, self.optimizers, self.scaler = at, data, model, optimizers, scaler
        self._origin = {"text": data.key} | {n: v for n, v in portable(config.to_dict()).items() if n in config.fixed}
        if self.checkpoint:
            self.folder.same_text(self._tokenizer, data.key, str(self.machine.dtype)[6:])
            saved = load_checkpoint(self.checkpoint, model, optimizers, self._origin)
            with told(self.checkpoint, CheckpointError, "its state is odd", MOVE_AWAY):
                if saved["scaler"]:  # empty unless it was saved in float16
                    scaler.load_state_dict(saved["scaler"])
                for name, value in vars(at).items():
                    setattr(at, name, type(value)(saved[name]))
                if saved.get("asked") != config.micro_batch:  # changed by hand
                    at.micro_batch = 0
                self._watch.lr, self._watch.rises = saved.get("lr", 0.0), self.progress() < saved.get("progress", 0.0)
        elif config.init_from:
            from machinery.huggingface import begin_with

            begin_with(config.init_from, model, config.to_dict(), data.encoding)
        Batches(data, config, self.machine, replace(at, micro_batch=1))  # refused here, before anything is moved:
        data.windows("val", config.block_size)  # text or processes that do not go with it
        if not self.checkpoint:
            self.folder.set_aside()
        self.machine.agree({"the text": data.key, "the step to go on from (is runs_dir one folder for all?)": at.step})
        self._begun_at, at.micro_batch = at.step, at.micro_batch or self._fitting_micro_batch(config)
        return at

    def _fitting_micro_batch(self, config) -> int:
        """As many sequences as fit the memory that was free."""
        machine = self.machine
        return choose_micro_batch(self.model, self.optimizers, config, machine.dtype, self._free, machine.processes)

    def compile(self, runner: torch.nn.Module, batches: Batches) -> Callable:
        """`runner` compiled, or itself where that is not wanted or fails; an eager step takes more memory."""
        self.note = "eager"
        if self.config.compile and self.progress() < 1:
            print("compiling the model: seconds to minutes")
            runner, self.note = compile_or_eager(runner, *batches.next(), self.machine)
            if self.machine.maximum(self.note.startswith("eager"))[0]:
                eager = replace(self.config, compile=False)
                batches.use_micro_batch(min(self.at.micro_batch, self._fitting_micro_batch(eager)))
            batches.seek()
        return runner

    def preflight(self, batches: Batches, gradient, update, evaluation, sample) -> None:
        """Say what the rest of the run takes, by calls that are timed, write what it is, and start its clock.

        `gradient` makes that of so many micro-batches, `update` moves the weights by nothing, `evaluation` and `sample`
        are those of the run. All is left as it was; the folder changes last, when nothing else can fail any more.
        """
        config, at, self._windows = self.config, self.at, batches.windows
        if self.progress() < 1:
            with left_as_it_was(self.model, *self.optimizers, self.scaler):
                seconds = time_parts(self.model, batches, gradient, update, evaluation, sample, config.max_hours)
            self._foretell(*seconds)
            text = {"key": self._origin["text"], "held_out_bytes": self.data.manifest["bytes"]["val"]}
            files = {"tokenizer": self._tokenizer, "data": text, "expected": self._band}
            self.folder.begin(config.to_dict(), at.step, **files, environment=describe_environment(self.machine))
        else:
            self.folder.configure(config.to_dict())
            print("its budget is used: a larger one goes on, another run_name or resume='never' begins anew")
        print(f"{config.run_name} from step {at.step:,}")
        if self.folder.writes:
            self.loggers.start(self.folder.path, portable(config.to_dict()))
        self._stop = self._closing.enter_context(StopRequest())
        self.screen = self._closing.enter_context(Screen(self.progress()))
        self._saver.say = self.screen.say
        self._closing.callback(self._saver.wait)
        gc.collect()
        gc.freeze()  # Python's collector looks at all objects again and again, and a step makes no circles
        self._closing.callback(gc.unfreeze)
        self._started, self._saved_seconds = time.perf_counter() - at.seconds, at.seconds

    def _foretell(self, step: float, scoring: float, sampling: float) -> None:
        """Print and keep what the rest of the run takes, where its parts take so many seconds."""
        config, machine, at = self.config, self.machine, self.at
        spent = at.step, at.tokens, at.seconds
        tokens = min(budget_left(config, config.batch_tokens / step, spent).values())
        steps = max(1, math.ceil(tokens / config.batch_tokens))
        self._between = seconds_between(config, at.step, steps, scoring, sampling)
        own, rate = replace(config, micro_batch=at.micro_batch), config.batch_tokens / (step + self._between)
        p = predict(self.model, self.optimizers, own, machine, rate, self._in_use, used=spent)
        p["tokens per second"] = self._watch.expected_rate = config.batch_tokens / step
        at_once = config.block_size * at.micro_batch * machine.processes  # the least that an evaluation computes
        parts = self.data.manifest["tokens"]["val"] / max(config.eval_tokens, at_once)
        p["last evaluation (s)"] = scoring * max(1.0, parts)  # of all held-out text, once the budget is used
        windows = self.data.windows("train", config.block_size)  # as they are now
        epochs, left = windows.epochs(at.tokens + p["tokens"]), budget_left(config, rate, spent)
        self._repeats = windows.epochs(at.tokens) >= 1
        self._forecast = print_preflight(p, config, machine, self.note, self.folder.path, epochs, left)
        p |= {"tokens": at.tokens + p["tokens"], "seconds": at.seconds + p["seconds"]}  # of the whole run
        ends, self._band = (self._forecast.ends(), self._forecast.band()) if self._forecast else ({}, {})
        self.predicted = {name: value for name, value in p.items() if math.isfinite(value)} | ends

    def clock(self) -> tuple[float, bool]:
        """Training time in seconds, over all parts of the run, and whether Ctrl-C or SIGTERM asked for the end."""
        return time.perf_counter() - self._started, self._stop.requested

    def has_news(self) -> bool:
        """Whether reports of this step are due. A resumed run has those of its first step, but perhaps a last score."""
        at = self.at
        if at.step > self._begun_at or at.step == 0:
            return True
        last = self.data.scored_tokens(math.inf), at.step
        return self.progress() >= 1 and (at.scores.get("val_tokens"), at.scores.get("val_step")) != last

    def stepped(self, loss: float, grad_norm: float, lr: float, since: float) -> None:
        """Note what a step gave that began when the clock stood at `since`."""
        size, peak, at = self.config.batch_tokens, self.machine.peak_flops, self.at
        rate = size / (time.perf_counter() - since)
        mfu = flops_per_token(self.model, self.config) * rate / self.machine.processes / peak if peak else None
        self._line = {"train_loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": rate, "mfu": mfu}
        if not self._repeats and self._windows.epochs(at.tokens) >= 1:
            self._repeats = True
            self.screen.say(f"step {at.step:,}: the whole text was read; it repeats now")
        if at.bad_steps:
            self._line["skipped_window"] = (at.tokens - size) // self.config.block_size
            return
        self._line |= self._watch.note(loss, rate, lr)
        for remark in self._watch.remarks:
            self.screen.say(f"step {at.step:,}: {remark}")

    def evaluated(self, scores: dict[str, float]) -> None:
        """Note what an evaluation found, and whether it is the best so far."""
        at, is_last = self.at, self.progress() >= 1
        tokens = self.data.scored_tokens(math.inf if is_last else self.config.eval_tokens)
        at.scores, rise = with_best(scores, tokens, at.step, at.scores, is_last)
        self._rise = self._rise if rise is None else rise
        self._line |= at.scores
        numbers = f"step {at.step:7,} {at.tokens:15,} tokens {at.seconds:8,.0f} s"
        said = self._forecast.place(self.progress(), at.tokens, scores["val_bpb"]) if self._forecast else ""
        self.screen.say(f"{numbers}   {scores['val_bpb']:.4f} bits per byte held out{', all of it' * is_last}{said}")

    def progress(self, more_steps: float = 0.0) -> float:
        """The used share of the budget, 0 to 1; with `more_steps`, after so many more, at most halfway from it to 1."""
        at, tokens = self.at, more_steps * self.config.batch_tokens
        seconds = (at.step and at.seconds) + (tokens / self._watch.rate() if tokens else 0.0)  # every run takes a step
        used = budget_used(self.config, at.step + more_steps, at.tokens + tokens, seconds)
        return min(used, (1 + self.progress()) / 2) if more_steps else used

    def log(self, progress: float) -> None:
        """Write the line of this step, tell the loggers, and move the line of progress."""
        at, config = self.at, self.config
        rate = config.batch_tokens / (config.batch_tokens / self._watch.rate() + self._between)
        left = max(0.0, min(budget_left(config, rate, (at.step, at.tokens, at.seconds)).values()) / rate)
        values = {"tokens": at.tokens, "seconds": at.seconds, "progress": progress, "seconds_left": left, **self._line}
        self.folder.append("metrics.jsonl", {"step": at.step, **values})
        self.loggers.tell(lambda logger: logger.metrics(at.step, values))
        self.screen.show(at.step, values)

    def sample(self, prompt: str, text: str) -> None:
        """Keep what the model wrote."""
        self.folder.append("samples.jsonl", {"step": self.at.step, "prompt": prompt, "text": text})
        self.loggers.tell(lambda logger: logger.sample(self.at.step, prompt, text))

    def checkpoint_due(self, done: bool, diverged: bool) -> bool:
        """Whether the run ends, is at its best, or steps or minutes are enough; not if it failed or has not moved."""
        at, config = self.at, self.config
        best = at.scores.get("best_step") == at.step
        long = at.seconds - self._saved_seconds >= 60 * config.checkpoint_minutes
        due = best or (long or at.step % config.checkpoint_every == 0) and not at.bad_steps
        lost = diverged or is_lost(config.vocab_size, self._line.get("val_loss", 0.0), *list(self._watch.losses)[-1:])
        return at.step > at.bad_steps and (due or done) and not lost

    def save(self) -> None:
        """Begin to write a checkpoint, beside training; the best one stays beside the newest."""
        at, config, self._saved_seconds = self.at, self.config, self.at.seconds
        state = {"scaler": self.scaler.state_dict(), "asked": config.micro_batch, "origin": self._origin}
        state |= vars(at) | {"lr": self._watch.lr, "progress": self.progress()}
        kept = config.keep_checkpoints, self.folder.writes, at.scores.get("best_step")
        self._saver.save(self.folder.path, self.model, self.optimizers, state, *kept)

    def finish(self, progress: float, diverged: bool) -> dict:
        """Write and return the summary; end a tokenization that still goes on."""
        at, machine = self.at, self.machine
        diverged |= is_lost(self.config.vocab_size, self._line.get("val_loss", 0.0))  # in fewer bad steps than end it
        rate = self.folder.usual_rate()
        flops = flops_per_token(self.model, self.config) * rate / machine.processes
        summary = {
            "status": "diverged" if diverged else "finished" if progress >= 1 else "interrupted",
            "parameters": count_parameters(self.model)["total"], "steps": at.step, "tokens": at.tokens,
            "train_seconds": at.seconds, **at.scores, "tokens_per_second": rate,
            "mfu": flops / machine.peak_flops if machine.peak_flops else None,
            "matmul_fraction": flops / measure_matmul_flops(machine), "peak_memory_bytes": machine.peak_memory(),
            "predicted": self.predicted, **({} if self.predicted else self.folder.measured(at.step)),
        }  # fmt: skip
        self._closing.close()
        if self._saver.failed and not diverged:  # the same command goes on from an earlier checkpoint
            summary["status"] = "interrupted"
        self.folder.finish(summary)
        self.loggers.finish(summary)
        self.data.stop()
        print_ending(at.scores, self._rise, diverged, self._forecast if progress >= 1 else None, at.tokens)
        return summary
