#!/usr/bin/env bash
# Fetch the pretraining images without root: four Debian packages and two npm packages, about 600 MB, unpacked to $1.
# None of them is a source of the tasks. Licences: Fashion-MNIST MIT, Open Clip Art public domain, Tux Paint stamps and
# Wesnoth GPL-2+, Noto emoji Apache-2.0, Twemoji CC BY 4.0. Only weights distilled from them are redistributed.
set -euo pipefail
mkdir -p "${1:?usage: pretraining/fetch.sh FOLDER}" && cd "$1"
for package in dataset-fashion-mnist openclipart-png tuxpaint-stamps-default wesnoth-1.16-data; do
  [ -d "$package" ] && continue
  apt-get download -q "$package"
  dpkg-deb -x "$package"_*.deb "$package" && rm "$package"_*.deb
done
for package in emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0; do
  folder=${package%@*}
  [ -d "$folder" ] && continue
  npm pack --silent "$package" >/dev/null
  mkdir "$folder" && tar -xzf "$folder"-*.tgz -C "$folder" && rm "$folder"-*.tgz
done
