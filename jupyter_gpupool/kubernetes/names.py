"""The names that manifests use: resources, labels, annotations, and what the webhook puts into a Pod."""

from __future__ import annotations

DOMAIN = "gpupool.io"

#: Resources that a container asks for: GPUs; the memory of each, in per cent or in MiB.
GPU = f"{DOMAIN}/gpu"
SHARE_PERCENT = f"{DOMAIN}/share-percent"
MEMORY_MIB = f"{DOMAIN}/memory-mib"
ASKED = (GPU, SHARE_PERCENT, MEMORY_MIB)
#: The one resource that takes their place: GPUs × per cent of each. A ResourceQuota limits their sum.
SLICE = f"{DOMAIN}/slice"

#: Label of a Pod whose environment has NUM_GPUS and PARTIAL_GPU.
INJECT = f"{DOMAIN}/inject"
#: Label that the webhook gives a Pod with slices, by which the controller finds it.
INJECTED = f"{DOMAIN}/injected"

#: Annotations of a Pod: the container that gets the GPUs, how it gets them ("run" or "attach"), which GPUs (such as
#: ``name=V100,emulated=false``), whether they may be of several servers, whether they stay while they are idle, the
#: Secret with the bundle, whose token it uses ("secret", or "account" for that of the Pod's ServiceAccount), and where
#: the client comes from ("image", or "copy" for one that an init container copies into the Pod).
CONTAINER = f"{DOMAIN}/container"
MODE = f"{DOMAIN}/mode"
FILTERS = f"{DOMAIN}/filters"
SPREAD = f"{DOMAIN}/spread"
NEVER_PARK = f"{DOMAIN}/never-park"
SECRET = f"{DOMAIN}/secret"
TOKEN = f"{DOMAIN}/token"
CLIENT = f"{DOMAIN}/client"
ANNOTATIONS = (CONTAINER, MODE, FILTERS, SPREAD, NEVER_PARK, SECRET, TOKEN, CLIENT)

#: The Secret with the bundle, where a Pod names no other.
DEFAULT_SECRET = "gpupool"
#: The ConfigMap with the pool's addresses and its authority, for Pods that use the token of their account.
CONFIG_MAP = "gpupool"
#: Whom such a token is for, and how long it is valid, in seconds; the kubelet replaces it after four fifths of that.
AUDIENCE, ACCOUNT_TOKEN_LIFE_S = "gpupool", 3600
#: The volume with the bundle, and the folder at which the container sees it.
VOLUME = "gpupool-bundle"
FOLDER = "/var/run/secrets/gpupool.io"
#: The volume with a copied client, which is also the init container's name, and where the container sees it.
CLIENT_VOLUME = "gpupool-client"
CLIENT_FOLDER = "/opt/gpupool"

#: Label of a Namespace that the controller gives a namespace of the pool and a Secret; its annotation with limits, such
#: as ``gpus=4,leases=10``.
MANAGED = f"{DOMAIN}/managed"
LIMITS = f"{DOMAIN}/limits"
#: Annotations of such a Secret: its token, and when that is to be replaced, in seconds since the epoch.
TOKEN_ID = f"{DOMAIN}/token-id"
RENEW_AT = f"{DOMAIN}/renew-at"
