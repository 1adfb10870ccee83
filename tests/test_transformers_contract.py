"""The transformers connector keeps the connector contract, with full and with windowed attention."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("transformers")

import torch
from transformers import PreTrainedModel

from kvstore.client import Client
from kvstore.connector import ReuseReport
from kvstore.connectors.transformers import TransformersConnector
from kvstore.testing.connector import CHUNK_TOKENS, PATIENT_MS, ConnectorContract, Logits
from kvstore.testing.models import random_model


class Prefill(ConnectorContract):
    model: ClassVar[PreTrainedModel]

    def run(
        self, client: Client, tokens: list[int], *, load_deadline_ms: float = PATIENT_MS
    ) -> tuple[Logits, ReuseReport]:
        connector = TransformersConnector(
            self.model, client, chunk_tokens=CHUNK_TOKENS, codec="raw", load_deadline_ms=load_deadline_ms
        )
        _, logits, report = connector.prefill(torch.tensor([tokens]))
        return logits[0].numpy(), report

    def without_store(self, tokens: list[int]) -> Logits:
        with torch.no_grad():
            logits: Logits = self.model(torch.tensor([tokens])).logits[0, -1].numpy()
        return logits


class TestLlama(Prefill):
    model = random_model("llama")


class TestMistralWithWindow(Prefill):
    model = random_model("mistral", window=20)
