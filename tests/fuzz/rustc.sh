#!/bin/sh
# The compiler as `cargo xtask fuzz` has cargo call it for the packages of this workspace: with the coverage that libFuzzer
# follows. Dependencies are taken as the other builds left them, and a stable compiler is enough. What runs while building
# stays as it is: nothing in it would count.
for word in "$@"; do
    case "$word" in
    build_script_build | build_script_main | proc-macro | -vV | --print*) exec "$@" ;;
    esac
done
exec "$@" --cfg fuzzing -Copt-level=1 -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
