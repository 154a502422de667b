"""A worker that trains nothing: it speaks WorkerService like the real one and behaves as the job's trigger words say.

`steps=N` reports N steps and succeeds; `crash=N` dies without a word before step N; `hang=N` stops reporting at step N;
`stubborn` ignores every request to stop; `previews` sends a preview with each step; `fail=N` completes with a failure
at step N; `slow=S` takes S seconds a step.
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2, training_pb2, training_pb2_grpc

PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478da63a80700008100"
    "807e1c29c70000000049454e44ae426082"
)
"""A picture of one pixel."""


class Worker:
    """One attempt at one job."""

    def __init__(self, job_id: str, token: str, trainer: str) -> None:
        self.job_id = job_id
        self.stub = training_pb2_grpc.WorkerServiceStub(grpc.insecure_channel(trainer))
        self.lease = self.stub.LeaseJob(
            training_pb2.LeaseJobRequest(job_id=job_id, worker_id=f"fake-{os.getpid()}", worker_token=token),
            wait_for_ready=True,
        )
        self.words = dict(word.partition("=")[::2] for word in self.lease.job.spec.trigger_words)
        self.sequence = 0
        self.should_stop = False

    def run(self) -> None:
        """Do what the trigger words say."""
        for step in range(self.lease.job.step + 1, int(self.words.get("steps", "3")) + 1):
            if self.words.get("crash") == str(step):
                sys.stderr.write(f"out of memory at step {step}\n")
                os._exit(9)
            if self.words.get("hang") == str(step):
                time.sleep(600)
            if self.words.get("fail") == str(step):
                failure = job_pb2.JobFailure(reason="NOT_FINITE", message="loss is nan", remedy="lower the rate")
                self.complete(training_pb2.WORKER_OUTCOME_FAILED, failure=failure)
                return
            self.report(step)
            if self.should_stop and "stubborn" not in self.words:
                self.complete(training_pb2.WORKER_OUTCOME_STOPPED)
                return
            time.sleep(float(self.words.get("slow", "0")))
        adapter = reference(b"adapter")
        self.complete(
            training_pb2.WORKER_OUTCOME_SUCCEEDED,
            adapter=adapter,
            metrics=reference(b"{}"),
            lycoris_config=reference(b"{ }"),
        )

    def report(self, step: int) -> None:
        """Report one step, and a checkpoint and a picture with it."""
        self.sequence += 1
        events = [
            job_pb2.TrainingJobEvent(step=job_pb2.StepMetrics(step=step, loss=1 / step, step_seconds=0.5)),
            job_pb2.TrainingJobEvent(checkpoint=job_pb2.Checkpoint(step=step, adapter=reference(b"%d" % step))),
            job_pb2.TrainingJobEvent(
                validation_image=job_pb2.ValidationImage(
                    step=step, prompt_name="cat", width=64, height=64, image=reference(PICTURE)
                )
            ),
            *([self.preview(step)] if "previews" in self.words else []),
        ]
        request = training_pb2.ReportProgressRequest(
            lease_id=self.lease.lease_id,
            report_sequence=self.sequence,
            events=events,
            phases=[job_pb2.PhaseTime(name="train", seconds=0.5)],
            adapter_report=job_pb2.AdapterReport(num_modules=24, num_parameters=1000),
        )
        answer = self.call(self.stub.ReportProgress, request)
        self.should_stop = self.should_stop or answer.should_stop

    def preview(self, step: int) -> job_pb2.TrainingJobEvent:
        """A picture on its way."""
        return job_pb2.TrainingJobEvent(
            validation_preview=job_pb2.ValidationPreview(
                step=step,
                prompt_name="cat",
                width=64,
                height=64,
                sampling_step=5,
                num_sampling_steps=20,
                timestep=640.5,
                image=reference(PICTURE),
            )
        )

    def complete(self, outcome: Any, **details: Any) -> None:
        """End the lease."""
        request = training_pb2.CompleteJobRequest(lease_id=self.lease.lease_id, outcome=outcome, **details)
        self.call(self.stub.CompleteJob, request)

    def call(self, method: Any, request: Any) -> Any:
        """Call the trainer, for as long as it takes to come back; exit with 3 when the lease is lost."""
        while True:
            try:
                return method(request, timeout=5)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.ABORTED:
                    os._exit(3)
                time.sleep(0.05)


def reference(body: bytes) -> common_pb2.ObjectRef:
    """Refer to an object that nobody reads."""
    bucket = os.environ["REVERIE_STORE_BUCKET"]
    digest = hashlib.sha256(body).hexdigest()
    return common_pb2.ObjectRef(uri=f"s3://{bucket}/fake/{digest}", size_bytes=len(body), sha256=digest)


def main() -> None:
    """Read the command line as the real worker does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job-id", default="")
    parser.add_argument("--standby", action="store_true")
    for name in ("--trainer", "--sampler", "--checkpoint", "--encoders", "--encoder-patience-seconds"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    job_id, token = options.job_id, os.environ.get("REVERIE_WORKER_TOKEN", "")
    if options.standby:
        line = sys.stdin.readline()
        if not line:
            return
        job_id, token = line.split()
    worker = Worker(job_id, token, options.trainer)

    def stop(_number: int, _frame: object) -> None:
        worker.should_stop = True

    signal.signal(signal.SIGTERM, stop)
    worker.run()


if __name__ == "__main__":
    assert Path(__file__).name == "fake_worker.py"
    main()
