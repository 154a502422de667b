"""The contract is complete: every RPC has a servicer method, an SDK method and a comment; nothing is UNIMPLEMENTED."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from reverie.encoder.v1 import encoder_pb2
from reverie.sampling.v1 import sampling_pb2
from reverie.training.v1 import training_pb2
from reverie.vae.v1 import vae_pb2

PROTOS = Path(__file__).resolve().parents[2] / "protos" / "reverie"
SERVICES: list[ServiceDescriptor] = [
    service
    for file in (encoder_pb2, vae_pb2, training_pb2, sampling_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
SERVICERS = {
    "EncoderService": "reverie_encoder.servicer:EncoderServicer",
    "VaeService": "reverie_vae.servicer:VaeServicer",
    "SamplingService": "reverie_sampler.servicer:SamplerServicer",
    "TrainingService": "reverie_trainer.jobs.api.training_servicer:TrainingServicer",
    "DatasetService": "reverie_trainer.jobs.api.dataset_servicer:DatasetServicer",
    "WorkerService": "reverie_trainer.jobs.api.worker_servicer:WorkerServicer",
}
INTERNAL = {"WorkerService"}
MUTATIONS = re.compile(r"^(Create|Cancel|Resume|Fork|Request|Import|Delete|Add)(?!Uploads)")


def method_id(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_every_rpc_has_a_servicer_method_of_its_own(method: MethodDescriptor) -> None:
    module, _, name = SERVICERS[method.containing_service.name].partition(":")
    servicer = getattr(import_module(module), name)
    implementing = next(cls for cls in inspect.getmro(servicer) if method.name in vars(cls))
    assert not implementing.__module__.endswith("_pb2_grpc"), f"{method.full_name} would answer UNIMPLEMENTED"


@pytest.mark.parametrize("method", [m for m in METHODS if m.containing_service.name not in INTERNAL], ids=method_id)
def test_every_public_rpc_is_called_by_the_sdk(method: MethodDescriptor) -> None:
    sdk = Path(inspect.getfile(import_module("reverie_client"))).parent
    sources = "\n".join(path.read_text() for path in sdk.glob("*.py"))
    assert re.search(rf"\.{method.name}\b", sources), f"no SDK method calls {method.full_name}"


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_every_rpc_has_its_own_request_and_response(method: MethodDescriptor) -> None:
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("method", [m for m in METHODS if MUTATIONS.match(m.name)], ids=method_id)
def test_every_mutation_takes_a_request_id(method: MethodDescriptor) -> None:
    assert "request_id" in method.input_type.fields_by_name


@pytest.mark.parametrize("method", [m for m in METHODS if m.name.startswith("List")], ids=method_id)
def test_every_list_is_paginated(method: MethodDescriptor) -> None:
    assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
    assert "next_page_token" in method.output_type.fields_by_name


def test_no_message_carries_a_tensor_inline() -> None:
    sources = "\n".join(path.read_text() for path in PROTOS.rglob("*.proto"))
    assert not re.search(r"^\s*(repeated )?(bytes|float) ", sources, re.MULTILINE)
