#!/usr/bin/env bash
# GoogleTest for the C++ tests, where it is missing and this is a Debian machine we may change.
set -euo pipefail
[ -e /usr/include/gtest/gtest.h ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "GoogleTest is missing (Debian: libgtest-dev): the C++ tests will be skipped"
  exit 0
fi
apt-get update -qq
apt-get install -y -qq libgtest-dev
