"""`reverie job check` in words: the sums and their parts."""

from reverie.training.v1.job_pb2 import EmbeddingError, EstimatePart, JobEstimate, PreparationReport
from reverie_client.cli.job_text import describe_preparation, estimate_lines


def test_every_sum_is_followed_by_its_parts() -> None:
    estimate = JobEstimate(
        worker_memory_bytes=20_500_000_000,
        worker_memory=[EstimatePart(name="transformer weights (int8-quanto)", size_bytes=17_100_000_000)],
        encoder_memory=[EstimatePart(name="llama (no_change)", size_bytes=15_000_000_000)],
        storage_bytes=367_000_000_000,
        storage_parts=[EstimatePart(name="Llama embeddings", size_bytes=336 * 10**9, least_bytes=210 * 10**9)],
        storage=[EstimatePart(name="compact", size_bytes=205_000_000_000, least_bytes=205_000_000_000)],
    )
    assert list(estimate_lines(estimate)) == [
        "the worker needs 20.5 GB of accelerator memory:",
        "     17.1 GB  transformer weights (int8-quanto)",
        "the encoders need, each where it runs:",
        "     15.0 GB  llama (no_change)",
        "the store needs 367.0 GB for embeddings and latents:",
        "    336.0 GB  Llama embeddings, compressed 210.0 GB at best",
        "with embedding_storage:",
        "    205.0 GB  compact",
    ]


def test_the_error_of_compact_is_shown_with_the_preparation() -> None:
    report = PreparationReport(embedding_errors=[EmbeddingError(encoder="llama", mean=0.0101, max=0.0132)])
    rows = dict(describe_preparation(report))
    assert rows["compact"] == "llama embeddings changed by 1.01% on average, 1.32% at most"
