/* The same with c-ares: one channel, and so one socket for as long as c-ares keeps it. */
#include <ares.h>
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <time.h>

struct result { int done, status; char text[INET_ADDRSTRLEN]; };

static void answered(void *arg, int status, int timeouts, struct ares_addrinfo *found) {
  struct result *result = arg;
  (void)timeouts;
  result->done = 1;
  result->status = status;
  strcpy(result->text, "none");
  for (struct ares_addrinfo_node *a = found ? found->nodes : NULL; a; a = a->ai_next)
    if (a->ai_family == AF_INET)
      inet_ntop(AF_INET, &((struct sockaddr_in *)a->ai_addr)->sin_addr, result->text, sizeof result->text);
  if (found) ares_freeaddrinfo(found);
}

int main(int argc, char **argv) {
  ares_channel channel;
  if (argc != 4 || ares_library_init(ARES_LIB_INIT_ALL) || ares_init(&channel)) return 99;
  int failed = 0;
  for (int n = atoi(argv[2]); n > 0; n--) {
    struct timespec start, end, pause = {atoi(argv[3]) / 1000, atoi(argv[3]) % 1000 * 1000000L};
    struct ares_addrinfo_hints hints;
    struct result result;
    memset(&hints, 0, sizeof hints);
    memset(&result, 0, sizeof result);
    clock_gettime(CLOCK_MONOTONIC, &start);
    ares_getaddrinfo(channel, argv[1], NULL, &hints, answered, &result);
    while (!result.done) {
      fd_set readable, writable;
      struct timeval wait = {1, 0};
      FD_ZERO(&readable);
      FD_ZERO(&writable);
      int count = ares_fds(channel, &readable, &writable);
      select(count, &readable, &writable, NULL, ares_timeout(channel, &wait, &wait));
      ares_process(channel, &readable, &writable);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    long took = (end.tv_sec - start.tv_sec) * 1000 + (end.tv_nsec - start.tv_nsec) / 1000000;
    printf("%s %ld %s\n", result.text, took, result.status ? ares_strerror(result.status) : "");
    fflush(stdout);
    failed += result.status != ARES_SUCCESS;
    nanosleep(&pause, NULL);
  }
  return failed;
}
