#!/usr/bin/env bash
# kustomize.sh DIR: put kustomize into DIR, from Debian trixie, which has it; bookworm has not.
# The package alone is fetched, by its archive's signature, and unpacked: nothing is installed, and
# this machine's own sources and lists stay as they are. Then: PATH=DIR:$PATH.
set -euo pipefail

target=${1:?error: name the folder to put kustomize into}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for program in apt-get dpkg-deb; do
  command -v "$program" >/dev/null || {
    echo "error: $program is missing; off Debian, install kustomize by your own means" >&2
    exit 2
  }
done
[ -f "$keyring" ] || { echo "error: $keyring is missing; apt install debian-archive-keyring" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"               # apt fetches as a user of its own
mkdir -p "$work/lists/partial" "$target"
echo "deb [signed-by=$keyring] http://deb.debian.org/debian trixie main" >"$work/trixie.list"
trixie=(apt-get -qq
  -o "Dir::Etc::sourcelist=$work/trixie.list" -o Dir::Etc::sourceparts=-
  -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work")
"${trixie[@]}" update
(cd "$work" && "${trixie[@]}" -o APT::Sandbox::User=root download kustomize)
dpkg-deb -x "$work"/kustomize_*.deb "$work/unpacked"
install -m 755 "$work/unpacked/usr/bin/kustomize" "$target/kustomize"
echo "$target/kustomize"
