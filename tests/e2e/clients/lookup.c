/* Looks a name up with getaddrinfo, again and again: NAME TIMES PAUSE_MS. Prints each IPv4 address and the time each
   look-up took in ms, ends with the number of those that failed. For glibc and musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

int main(int argc, char **argv) {
  if (argc != 4) return 99;
  int failed = 0;
  for (int n = atoi(argv[2]); n > 0; n--) {
    struct timespec start, end, pause = {atoi(argv[3]) / 1000, atoi(argv[3]) % 1000 * 1000000L};
    struct addrinfo hints, *found = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    clock_gettime(CLOCK_MONOTONIC, &start);
    int code = getaddrinfo(argv[1], NULL, &hints, &found);
    clock_gettime(CLOCK_MONOTONIC, &end);
    long took = (end.tv_sec - start.tv_sec) * 1000 + (end.tv_nsec - start.tv_nsec) / 1000000;
    const char *text = "none";
    char buffer[INET_ADDRSTRLEN];
    for (struct addrinfo *a = found; a && code == 0; a = a->ai_next)
      if (a->ai_family == AF_INET)
        text = inet_ntop(AF_INET, &((struct sockaddr_in *)a->ai_addr)->sin_addr, buffer, sizeof buffer);
    printf("%s %ld %s\n", text, took, code ? gai_strerror(code) : "");
    fflush(stdout);
    failed += code != 0;
    if (found) freeaddrinfo(found);
    nanosleep(&pause, NULL);
  }
  return failed;
}
