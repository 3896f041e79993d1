"""
export.py's batches for Neuronpedia against its own client: would it send the same requests?

    pip install neuronpedia
    python records/interop/neuronpedia_client.py DIRECTORY     # of export_format=neuronpedia

Makes the client's objects from every batch, has it build its request, and compares. Sends nothing.
"""
import json
import sys
from pathlib import Path

from neuronpedia.np_activation import Activation
from neuronpedia.np_feature import Feature, Logit
from neuronpedia.requests.feature_request import FeatureRequest

sent = []


def as_client_object(body, feature):
    where = (body["modelId"], body["source"], feature["index"])
    return Feature(
        *where,
        density=feature["density"],
        top_logits=[Logit(**logit) for logit in feature["topLogits"]],
        bottom_logits=[Logit(**logit) for logit in feature["bottomLogits"]],
        activations=[Activation(*where, **activation) for activation in feature["activations"]],
    )


def without_empty(value):
    """Without the fields that the client adds for what we don't give: None and empty lists."""
    if isinstance(value, dict):
        return {key: without_empty(v) for key, v in value.items() if v is not None and v != []}
    if isinstance(value, list):
        return [without_empty(v) for v in value]
    return value


request = FeatureRequest(api_key="none")
request.send_request = lambda method, uri, json: sent.append((method, uri, json))
files = sorted(Path(sys.argv[1]).glob("*/batch-*.json"))
n_features = n_activations = 0
for path in files:
    body = json.loads(path.read_text())
    features = [as_client_object(body, feature) for feature in body["features"]]
    request.upload_batch(body["modelId"], body["source"], features)
    method, uri, theirs = sent.pop()
    assert (method, uri) == ("POST", "upload-batch")
    assert without_empty(theirs) == without_empty(body), path
    n_features += len(features)
    n_activations += sum(len(feature.activations) for feature in features)
largest = max(path.stat().st_size for path in files)
print(f"{len(files)} requests, {n_features} features, {n_activations} activations: the client "
      f"would send the same; the largest has {largest:,} bytes")
