"""``gpupool kubernetes``"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.request_schema import FIELDS

from .command import Command
from .options import Parser, UsageError, lifetime, number, port, whole_number

#: Signals that end the controller.
_ENDING = (signal.SIGTERM, signal.SIGINT)


class WebhookApp(Command):
    name = "kubernetes webhook"
    usage = "--certificate FILE --key FILE [options]"
    description = (
        "Answer a Kubernetes API server's AdmissionReviews over TLS, until SIGTERM: give Pods what they ask of the\n"
        "pool. It asks neither the pool nor the API server anything. Replaced certificate files are read again."
    )
    examples = "  gpupool kubernetes webhook --certificate /tls/tls.crt --key /tls/tls.key"
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("--certificate", metavar="FILE", required=True, help="certificate (PEM)")
        parser.add_argument("--key", metavar="FILE", required=True, help="its private key (PEM)")
        parser.add_argument(
            "--host", metavar="ADDRESS", default="", help="address to listen on (default: all)"
        )
        parser.add_argument(
            "--port", metavar="N", type=port, default=8443, help="port to listen on (default: %(default)s)"
        )
        parser.add_argument(
            "--leaving",
            metavar="SECONDS",
            type=whole_number(0, 3600, "the time to leave"),
            default=5,
            help="still answer for that long after SIGTERM, for callers that do not know yet (default: %(default)s)",
        )
        add_webhook_options(parser)

    def act(self) -> int:
        from jupyter_gpupool.kubernetes.injection import Settings
        from jupyter_gpupool.kubernetes.webhook import Webhook
        from jupyter_gpupool.server.daemon.https import Certificate

        log_as_json(self.args.debug)
        certificate = Certificate(self.args.certificate, self.args.key)
        settings = Settings(self.args.gpu_memory, self.args.account_tokens, self.args.client_image)

        args = self.args

        async def serve() -> None:
            await Webhook(settings, certificate, args.host, args.port, args.leaving).serve()

        asyncio.run(serve())
        return 0


class ControllerApp(Command):
    name = "kubernetes controller"
    description = (
        "Keep a Kubernetes cluster and the pool in step, until SIGTERM: a Namespace with the label\n"
        "gpupool.io/managed=true gets a namespace of the pool, with its limits, and a Secret with a token, which is\n"
        "replaced after two thirds of its life; nodes offer the pool's slices; Pods get Events about their leases.\n"
        "Several controllers elect a leader by a Lease. Needs an administrator's bundle."
    )
    examples = "  GPUPOOL_CONFIG_DIR=/administrator gpupool kubernetes controller"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "--api-server", metavar="URL", default="", help="API server (default: this Pod's)"
        )
        parser.add_argument(
            "--api-token", metavar="FILE", default="", help="token for it (default: this Pod's)"
        )
        parser.add_argument(
            "--api-ca", metavar="FILE", default="", help="its authority (default: this Pod's)"
        )
        parser.add_argument(
            "--interval",
            metavar="SECONDS",
            type=interval,
            default=30,
            help="seconds between two rounds while nothing changes (default: %(default)s)",
        )
        parser.add_argument(
            "--namespace",
            metavar="NAME",
            default="gpupool-system",
            help="namespace of the Lease by which one of several controllers leads (default: %(default)s)",
        )
        parser.add_argument(
            "--token-life",
            metavar="LIFETIME",
            type=lifetime,
            default=lifetime("30d"),
            help="lifetime of a namespace's token, such as 12h or 30d (default: 30d)",
        )
        parser.add_argument(
            "--adopt",
            metavar="NAME",
            action="append",
            default=[],
            help="also keep this namespace of the pool, which the controller did not make (may be repeated)",
        )
        add_user_prefix(parser)

    def check(self) -> None:
        if self.args.token_life is None:
            raise UsageError("--token-life must have an end, because the token is replaced before it")

    def act(self) -> int:
        from jupyter_gpupool.kubernetes.api_server import APIServer
        from jupyter_gpupool.kubernetes.controller import Controller
        from jupyter_gpupool.kubernetes.controller_manifests import NAME
        from jupyter_gpupool.kubernetes.leadership import Leadership
        from jupyter_gpupool.kubernetes.pool_watching import PoolWatch
        from jupyter_gpupool.kubernetes.watching import ClusterWatch

        if not self.names_pool():
            raise UsageError("which pool? Set GPUPOOL_CONFIG_DIR to an administrator's bundle")
        log_as_json(self.args.debug)
        api = APIServer(self.args.api_server, self.args.api_token, self.args.api_ca)
        # Blocked in all threads, so that this one can wait for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        stop, changed = threading.Event(), threading.Event()
        cluster, client = ClusterWatch(api, changed), self.pool()[0]
        identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        leadership = Leadership(api, self.args.namespace, NAME, identity, changed)
        controller = Controller(
            api,
            client,
            cluster,
            leadership.leads,
            self.args.token_life,
            self.args.adopt,
            addresses(),
            self.args.user_prefix,
        )
        rounds = threading.Thread(target=controller.run, args=(self.args.interval, changed, stop))
        for part in (cluster, PoolWatch(client, changed), leadership, rounds):
            part.start()
        while rounds.is_alive() and signal.sigtimedwait(_ENDING, 1.0) is None:
            pass
        failed = not rounds.is_alive()
        stop.set()
        changed.set()
        rounds.join()
        leadership.stop()
        cluster.stop()
        if failed:
            raise PoolError("the controller stopped because of an internal error; see the log above")
        return 0


class CopyClientApp(Command):
    name = "kubernetes copy-client"
    usage = "DIRECTORY"
    description = (
        "Copy the client, with what it imports besides PyTorch, into a directory: DIRECTORY/bin/gpupool runs it by\n"
        "the Python that it finds there. The webhook lets an init container do this where a Pod's image lacks it."
    )
    examples = "  gpupool kubernetes copy-client /opt/gpupool"
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("directory", metavar="DIRECTORY", help="where to write it")

    def act(self) -> int:
        from jupyter_gpupool.kubernetes.client_copy import copy_client

        copy_client(Path(self.args.directory).expanduser())
        return 0


class ManifestsApp(Command):
    name = "kubernetes manifests"
    usage = "--image IMAGE (--tls DIRECTORY | --issuer NAME | --admission policy) [options]"
    description = (
        "Print the webhook's manifests, for kubectl apply -f -. The directory keeps the webhook's own authority and\n"
        "its certificate, which are made where they are missing; the certificate is renewed in its last third."
    )
    examples = (
        "  gpupool kubernetes manifests --image registry.example/gpupool:1 --tls ./webhook-tls | kubectl apply -f -\n"
        "  gpupool kubernetes manifests --image registry.example/gpupool:1 --issuer cluster-ca --kubernetes 1.33"
    )
    asks_pool = False

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "--image", metavar="IMAGE", required=True, help="an image that contains jupyter_gpupool"
        )
        parser.add_argument(
            "--tls",
            metavar="DIRECTORY",
            help="directory with the webhook's own authority and its certificate",
        )
        parser.add_argument(
            "--issuer", metavar="NAME", help="ClusterIssuer of cert-manager that certifies the webhook"
        )
        parser.add_argument(
            "--namespace",
            metavar="NAME",
            default="gpupool-system",
            help="namespace of the webhook (default: %(default)s)",
        )
        parser.add_argument(
            "--kubernetes",
            metavar="VERSION",
            type=kubernetes_version,
            default="1.28",
            help="version of the API server. Before 1.28 only Pods with the label gpupool.io/inject are seen "
            "(default: %(default)s and later)",
        )
        parser.add_argument(
            "--admission",
            choices=("webhook", "policy", "both"),
            default="webhook",
            help="what serves Pods: the webhook, from Kubernetes 1.36 on policies in the API server itself (1.34 where "
            "v1beta1 is switched on), or these for most Pods and the webhook for the others (default: %(default)s)",
        )
        parser.add_argument(
            "--replicas",
            metavar="N",
            type=whole_number(1, 100, "the count of Pods"),
            default=2,
            help="number of Pods (default: %(default)s)",
        )
        parser.add_argument(
            "--controller",
            action="store_true",
            help="also print the controller, whose Secret gpupool-administrator needs an administrator's bundle",
        )
        parser.add_argument(
            "--pool",
            metavar="GPUS",
            type=whole_number(0, 1024, "the count of GPUs"),
            help="also print a pool within the cluster, on a node with so many NVIDIA GPUs; 0: of emulated ones",
        )
        parser.add_argument(
            "--farm",
            action="store_true",
            help="the pool within the cluster has so many GPUs on every node with GPUs, which Ray joins; needs the "
            "Secret gpupool-authority",
        )
        parser.add_argument(
            "--database",
            metavar="SECRET[/KEY]",
            type=secret_key,
            help="two servers of a farm share the PostgreSQL whose URL this Secret has (default of KEY: url)",
        )
        parser.add_argument(
            "--service-monitor",
            metavar="NAMESPACE",
            default="",
            help="let the Prometheus of that namespace read the metrics of the pool within the cluster, by a "
            "ServiceMonitor of its operator",
        )
        parser.add_argument(
            "--output",
            metavar="DIRECTORY",
            help="write a kustomize base there, for kubectl apply -k DIRECTORY, instead of printing",
        )
        add_user_prefix(parser)
        add_webhook_options(parser)

    def check(self) -> None:
        args = self.args
        if args.admission == "policy" and (args.tls or args.issuer):
            raise UsageError("without a webhook there is nothing to certify; leave out --tls and --issuer")
        if args.admission != "webhook":
            from jupyter_gpupool.kubernetes.admission_policy import POLICIES_BETA

            if args.kubernetes < POLICIES_BETA:
                raise UsageError("policies need Kubernetes 1.34 or later; say which with --kubernetes")
        if args.admission != "policy" and bool(args.tls) == bool(args.issuer):
            raise UsageError("who certifies the webhook? Give either --tls DIRECTORY or --issuer NAME")
        if self.args.service_monitor and self.args.pool is None:
            raise UsageError("--service-monitor is for a pool within the cluster; add --pool GPUS")
        if self.args.farm and self.args.pool is None:
            raise UsageError("--farm is for a pool within the cluster; add --pool GPUS")
        if self.args.database and not self.args.farm:
            raise UsageError("two pool servers need GPU servers that both reach; add --farm")

    def act(self) -> int:
        from jupyter_gpupool.kubernetes.controller_manifests import controller_manifests
        from jupyter_gpupool.kubernetes.farm_manifests import farm_manifests
        from jupyter_gpupool.kubernetes.kustomize import write_base
        from jupyter_gpupool.kubernetes.manifests import TLS, Options, as_yaml, dns_names, manifests
        from jupyter_gpupool.kubernetes.pool_manifests import pool_manifests

        args, tls = self.args, None
        if args.tls:
            from jupyter_gpupool.kubernetes.certificate import kept_certificate

            pair, ca = kept_certificate(Path(args.tls).expanduser(), dns_names(args.namespace))
            tls = TLS(pair.certificate, pair.key, ca)
        options = Options(
            args.image,
            args.namespace,
            args.kubernetes,
            args.replicas,
            tls,
            args.issuer or "",
            args.gpu_memory,
            args.account_tokens,
            args.client_image,
            args.user_prefix,
            args.pool or 0,
            args.service_monitor,
            args.admission,
            args.farm,
            args.database,
        )
        objects = manifests(options)
        if args.controller:
            objects += controller_manifests(options)
        if args.pool is not None:
            objects[1:1] = farm_manifests(options) if args.farm else pool_manifests(options)
        if args.output:
            for path in write_base(Path(args.output).expanduser(), objects):
                print(f"Wrote {path}")
            return 0
        print(as_yaml(objects), end="")
        return 0


def addresses() -> dict[str, str] | None:
    """Return the files of the installed bundle without its token; None without a bundle."""
    from jupyter_gpupool.client import bundle

    found = bundle.find()
    if found is None:
        return None
    hosts = [url.partition("://")[2] for url in found.urls]
    content = bundle.files(found.ca, "", "", hosts)
    return {name: content[name] for name in (bundle.CA, bundle.SERVERS)}


def log_as_json(debug: bool) -> None:
    """Write the log to stderr, an object a line."""
    from jupyter_gpupool.server.daemon.json_logs import JSONLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every call


def interval(text: str) -> float:
    """Parse a number of seconds between two looks. Raises ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.1 <= found <= 3600:
        raise argparse.ArgumentTypeError(f"the interval is from 0.1 to 3600 seconds, not {text!r}")
    return found


def kubernetes_version(text: str) -> tuple[int, int]:
    """Parse a version such as 1.30. Raises ArgumentTypeError."""
    match = re.fullmatch(r"v?1\.([0-9]{1,3})(?:\.[0-9]+)*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a version of Kubernetes is written as 1.30, not {text!r}")
    return 1, int(match[1])


def secret_key(text: str) -> tuple[str, str]:
    """Parse a Secret's name with a key, such as gpupool-database/url. Raises ArgumentTypeError."""
    name, _, key = text.partition("/")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) or not re.fullmatch(r"[A-Za-z0-9._-]*", key):
        raise argparse.ArgumentTypeError(f"a Secret is written as NAME or NAME/KEY, not {text!r}")
    return name, key or "url"


def add_user_prefix(parser: argparse.ArgumentParser) -> None:
    """Add the option by which the controller knows the leases of the cluster's ServiceAccounts."""
    parser.add_argument(
        "--user-prefix",
        metavar="TEXT",
        help="user_prefix of this cluster in the pool's c.OIDC.issuers, '' for none: the controller then also releases "
        "the leases of Pods that used the tokens of their ServiceAccounts (default: it does not)",
    )


def add_webhook_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which MiB are counted as shares, and that say whose tokens and which client Pods use."""
    parser.add_argument(
        "--client-image",
        metavar="IMAGE",
        default="",
        help="image from which the client is copied into Pods with the annotation gpupool.io/client: copy "
        "(default of manifests: --image)",
    )
    parser.add_argument(
        "--account-tokens",
        action="store_true",
        help="Pods use the tokens of their ServiceAccounts, which the pool has to accept, unless they name a Secret",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="MiB",
        type=number(FIELDS["memory_mib"]),
        help="memory of the pool's smallest GPU, by which requests in MiB count against quotas (default: they count as "
        "whole GPUs)",
    )
