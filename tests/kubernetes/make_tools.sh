#!/usr/bin/env bash
# Makes a Kubernetes control plane for tests/kubernetes: 1.20.2 of Debian's source package, built with Debian's Go,
# and Debian's etcd and kubectl. Nothing is installed. Building needs no root; the tests do (mount and PID namespaces).
# usage: make_tools.sh FOLDER    Programs that FOLDER/bin already has are kept.
set -euo pipefail
(($# == 1)) || { sed -n 2,4p "$0" >&2; exit 2; }
mkdir -p "$1/bin" "$1/apt/lists/partial" "$1/packages" "$1/log"
cd "$1"
folder=$PWD
programs=(kube-apiserver kube-controller-manager kube-scheduler)
jobs=${KUBERNETES_JOBS:-2}

missing() { for name in "$@"; do [[ -x $folder/bin/$name ]] || return 0; done; return 1; }
step() { echo "$(date +%T) $*"; }

missing etcd kubectl "${programs[@]}" || exit 0
for program in apt-get dpkg-deb dpkg-source patch; do
  command -v "$program" >/dev/null || { echo "$program is missing: it takes Debian 12 with dpkg-dev" >&2; exit 1; }
done
grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release || { echo "these packages are Debian 12's (bookworm)" >&2; exit 1; }

# This machine's own sources of bookworm, with the source packages, in lists of our own.
: >apt/sources.list
while read -r kind rest; do
  [[ $kind == deb && $rest == *bookworm* ]] && printf 'deb %s\ndeb-src %s\n' "$rest" "$rest" >>apt/sources.list
done < <(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null)
mkdir -p apt/parts
for file in /etc/apt/sources.list.d/*.sources; do
  [[ -e $file ]] && grep -q 'Suites:.*bookworm' "$file" && sed 's/^Types:.*/Types: deb deb-src/' "$file" >"apt/parts/${file##*/}"
done
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$folder/apt/sources.list" -o "Dir::Etc::sourceparts=$folder/apt/parts"
  -o "Dir::State::lists=$folder/apt/lists" -o "APT::Sandbox::User=$(id -un)")
step "fetching packages"
"${apt[@]}" update

unpack() { # PACKAGE: its files below packages/root
  [[ -e packages/$1.done ]] && return
  (cd packages && "${apt[@]}" download "$1" && dpkg-deb -x "$1"_*.deb root && touch "$1.done")
}

if missing etcd; then
  unpack etcd-server
  cp packages/root/usr/bin/etcd bin/
fi
if missing kubectl; then
  unpack kubernetes-client
  cp packages/root/usr/bin/kubectl bin/
fi
missing "${programs[@]}" || exit 0

for package in golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev; do unpack "$package"; done
tree=$folder/go/src/k8s.io/kubernetes
if [[ ! -e $folder/go/unpacked ]]; then
  rm -rf "$folder/go"
  (cd packages && "${apt[@]}" source --download-only kubernetes)
  mkdir -p "${tree%/*}"
  dpkg-source --no-check -x packages/kubernetes_*.dsc "$tree" >log/source
  # The vendored 1.0.1 does not link with Go 1.18 and later.
  rm -rf "$tree/vendor/github.com/modern-go/reflect2"
  cp -r packages/root/usr/share/gocode/src/github.com/modern-go/reflect2 "$tree/vendor/github.com/modern-go/"
  touch "$folder/go/unpacked"
fi

# Debian splits Go over two packages, which refer to each other by absolute links.
root=$folder/packages/root
goroot=$folder/goroot
if [[ ! -e $goroot/complete ]]; then
  rm -rf "$goroot" && mkdir -p "$goroot"
  for part in lib share; do
    (cd "$root/usr/$part/go-1.19" && find . -type d -o -type f | tar -c --no-recursion -T - -f -) | tar -x -C "$goroot" -f -
  done
  touch "$goroot/complete"
fi
export GOROOT=$goroot GOPATH=$folder/go GO111MODULE=off CGO_ENABLED=0 GOCACHE=$folder/gocache GOFLAGS=-p=$jobs
export PATH=$goroot/bin:$PATH
cd "$tree"

if [[ ! -e pkg/generated/openapi/zz_generated.openapi.go ]]; then
  step "generating the OpenAPI definitions"
  go build -o "$folder/bin/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
  marked=$(grep -rlE '^// ?\+k8s:openapi-gen=' --include=*.go pkg staging/src/k8s.io | xargs -n1 dirname | sort -u |
    grep -vE '/(testdata|test|examples|sample-[a-z]+|code-generator|kube-openapi)(/|$)' |
    sed -e 's,^staging/src/,k8s.io/kubernetes/vendor/,' -e 's,^pkg/,k8s.io/kubernetes/pkg/,' | paste -sd,)
  "$folder/bin/openapi-gen" -i "$marked" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
    -h hack/boilerplate/boilerplate.generatego.txt -r "$folder/log/openapi-violations" >"$folder/log/openapi" 2>&1
fi

flags="-s -w"
for package in k8s.io/component-base k8s.io/client-go/pkg; do
  version=k8s.io/kubernetes/vendor/$package/version
  [[ $package == */pkg ]] && version=k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version
  flags+=" -X $version.gitVersion=v1.20.2 -X $version.gitMajor=1 -X $version.gitMinor=20"
done
for program in "${programs[@]}"; do
  missing "$program" || continue
  step "building $program"
  go build -tags providerless -ldflags "$flags" -o "$folder/bin/$program" "./cmd/$program"
done
step "made $(ls "$folder/bin" | paste -sd' ')"
