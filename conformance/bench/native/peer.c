// SPDX-License-Identifier: Apache-2.0
//
// What the benchmark measures with, in one small program: one thread and epoll each, no allocation per packet, so that
// the kernel's path and not the program is what saturates.
//
//   peer proxy --counters FILE --listen NAME,PORT[,ADDRESS,PORT] ... [--keep-source NAME] [--mark N] [--reuseport]
//     A TCP proxy as a ztunnel is one without TLS: listens on [::]:PORT with IP_TRANSPARENT. Without ADDRESS,PORT a
//     connection goes on to where its client wanted (SO_ORIGINAL_DST where conntrack knows it, else the socket's own
//     address), with them to that place. --keep-source NAME: connections of that listener go on with the client's
//     address. --mark: SO_MARK of every socket. --reuseport: SO_REUSEPORT, as ztunnel's listeners inside pods have it.
//   peer server --http PORT --echo PORT --counters FILE
//     Answers each HTTP request head with 200 and 2 bytes, and on the other port sends back what it gets.
//   peer rr ADDRESS PORT CONNECTIONS MILLISECONDS [SIZE]
//     One request of SIZE bytes (default 1) in flight on each connection: latencies without any protocol above TCP.
//   peer crr ADDRESS PORT PARALLEL MILLISECONDS
//     New connections: connect, one byte there and back, close with RST.
//   peer hold ADDRESS PORT CONNECTIONS ACTIVE MILLISECONDS
//     Opens CONNECTIONS, one byte there and back on each, then rr on ACTIVE of them while the others stay open.
//   peer stats
//     Has the kernel count the run time of BPF programs for as long as it lives, and says "on".
//
// FILE is mapped: 64-bit counters in the machine's byte order, that whoever reads it sees as they are. Proxy: five for
// each listener in the order of the options: connections accepted, connected to their destination, failed, bytes from
// clients, bytes from servers. Server: connections and bytes on --http, the same two on --echo.
// rr, crr and hold print one JSON object.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/netfilter_ipv4.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (256 * 1024)
#define EVENTS 512
#define MAX_LISTENERS 16
// linux/in6.h cannot be included beside netinet/in.h.
#ifndef IPV6_TRANSPARENT
#define IPV6_TRANSPARENT 75
#endif
#ifndef IP6T_SO_ORIGINAL_DST
#define IP6T_SO_ORIGINAL_DST 80
#endif
#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

static char scratch[BUFFER];
static int epoll_fd;

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "peer: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  exit(1);
}

static int must(int result, const char *what) {
  if (result < 0) die("%s: %s", what, strerror(errno));
  return result;
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void option(int fd, int level, int name, int value, const char *what) {
  must(setsockopt(fd, level, name, &value, sizeof value), what);
}

static void reset_on_close(int fd) {
  struct linger linger = {.l_onoff = 1, .l_linger = 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
}

static void watch(int fd, uint32_t events, void *owner, int operation) {
  struct epoll_event event = {.events = events, .data.ptr = owner};
  must(epoll_ctl(epoll_fd, operation, fd, &event), "epoll_ctl");
}

static uint64_t *map_counters(const char *path) {
  int fd = must(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600), path);
  must(ftruncate(fd, 4096), "ftruncate");
  void *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) die("mmap %s: %s", path, strerror(errno));
  close(fd);
  return map;
}

union address {
  struct sockaddr any;
  struct sockaddr_in v4;
  struct sockaddr_in6 v6;
};

static socklen_t size_of(const union address *a) {
  return a->any.sa_family == AF_INET ? sizeof a->v4 : sizeof a->v6;
}

static union address parse(const char *text, int port) {
  union address a = {0};
  if (inet_pton(AF_INET, text, &a.v4.sin_addr) == 1) {
    a.v4.sin_family = AF_INET;
    a.v4.sin_port = htons((uint16_t)port);
  } else if (inet_pton(AF_INET6, text, &a.v6.sin6_addr) == 1) {
    a.v6.sin6_family = AF_INET6;
    a.v6.sin6_port = htons((uint16_t)port);
  } else {
    die("not an address: %s", text);
  }
  return a;
}

// A dual-stack socket sees IPv4 as ::ffff:a.b.c.d; sockets towards the other side are made of the real family.
static void unmap(union address *a) {
  if (a->any.sa_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&a->v6.sin6_addr)) return;
  union address v4 = {.v4 = {.sin_family = AF_INET, .sin_port = a->v6.sin6_port}};
  memcpy(&v4.v4.sin_addr, &a->v6.sin6_addr.s6_addr[12], 4);
  *a = v4;
}

static int listen_on(int port, bool transparent, bool reuseport, int mark) {
  int fd = must(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket");
  option(fd, SOL_SOCKET, SO_REUSEADDR, 1, "SO_REUSEADDR");
  option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0, "IPV6_V6ONLY");
  if (reuseport) option(fd, SOL_SOCKET, SO_REUSEPORT, 1, "SO_REUSEPORT");
  if (transparent) {
    option(fd, SOL_IP, IP_TRANSPARENT, 1, "IP_TRANSPARENT");
    option(fd, SOL_IPV6, IPV6_TRANSPARENT, 1, "IPV6_TRANSPARENT");
  }
  if (mark) option(fd, SOL_SOCKET, SO_MARK, mark, "SO_MARK");
  struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
  must(bind(fd, (struct sockaddr *)&any, sizeof any), "bind");
  must(listen(fd, 16384), "listen");
  return fd;
}

static void allow_many_files(void) {
  struct rlimit limit;
  must(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
  limit.rlim_cur = limit.rlim_max;
  must(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
}

// ---------------------------------------------------------------------------------------------------------- proxy

enum kind { LISTENER, END };
enum count { ACCEPTED, CONNECTED, FAILED, FROM_CLIENT, FROM_SERVER, COUNTS };

struct listener {
  enum kind kind;
  int fd;
  char name[32];
  bool keep_source;
  bool fixed;
  union address to;
  uint64_t *counters;
};

// One end of a proxied connection. What was read here and the other end did not take yet is in `held`.
struct end {
  enum kind kind;
  int fd;
  struct pair *pair;
  struct end *other;
  char *held;
  size_t held_size, held_sent;
  bool finished;       // read 0 bytes here
  bool shut;           // and told the other end so
  uint32_t watched;
};

struct pair {
  struct end client, server;
  struct listener *listener;
  bool connecting;
  bool closed;
  struct pair *next;
};

static int mark;
static struct pair *graveyard;

static void watch_end(struct end *e) {
  struct pair *p = e->pair;
  uint32_t wanted = 0;
  if (e == &p->server && p->connecting) {
    wanted = EPOLLOUT;
  } else {
    if (!e->finished && e->held == NULL && !p->connecting) wanted |= EPOLLIN;
    if (e->other->held != NULL) wanted |= EPOLLOUT;
  }
  if (wanted == e->watched) return;
  e->watched = wanted;
  watch(e->fd, wanted, e, EPOLL_CTL_MOD);
}

// Events for it may still be in the batch that is being worked on: freed after the batch.
static void close_pair(struct pair *p, bool reset) {
  if (p->closed) return;
  p->closed = true;
  if (p->connecting) p->listener->counters[FAILED]++;
  if (reset) {
    reset_on_close(p->client.fd);
    reset_on_close(p->server.fd);
  }
  close(p->client.fd);
  close(p->server.fd);
  p->next = graveyard;
  graveyard = p;
}

static void bury(void) {
  while (graveyard != NULL) {
    struct pair *p = graveyard;
    graveyard = p->next;
    free(p->client.held);
    free(p->server.held);
    free(p);
  }
}

static bool finish_if_done(struct end *e) {
  struct pair *p = e->pair;
  if (e->finished && e->held == NULL && !e->shut) {
    e->shut = true;
    shutdown(e->other->fd, SHUT_WR);
  }
  if (p->client.shut && p->server.shut) {
    close_pair(p, false);
    return false;
  }
  return true;
}

static void move(struct end *e) {
  struct pair *p = e->pair;
  ssize_t got = recv(e->fd, scratch, sizeof scratch, 0);
  if (got < 0) {
    if (errno != EAGAIN && errno != EINTR) close_pair(p, true);
    return;
  }
  if (got == 0) {
    e->finished = true;
    if (finish_if_done(e)) watch_end(e);
    return;
  }
  p->listener->counters[e == &p->client ? FROM_CLIENT : FROM_SERVER] += (uint64_t)got;
  ssize_t sent = send(e->other->fd, scratch, (size_t)got, MSG_NOSIGNAL);
  if (sent < 0) {
    if (errno != EAGAIN) {
      close_pair(p, true);
      return;
    }
    sent = 0;
  }
  if (sent == got) return;
  e->held_size = (size_t)(got - sent);
  e->held_sent = 0;
  e->held = malloc(e->held_size);
  if (e->held == NULL) die("out of memory");
  memcpy(e->held, scratch + sent, e->held_size);
  watch_end(e);
  watch_end(e->other);
}

// What the other end holds for this one.
static void drain(struct end *e) {
  struct end *from = e->other;
  ssize_t sent = send(e->fd, from->held + from->held_sent, from->held_size - from->held_sent, MSG_NOSIGNAL);
  if (sent < 0) {
    if (errno != EAGAIN) close_pair(e->pair, true);
    return;
  }
  from->held_sent += (size_t)sent;
  if (from->held_sent < from->held_size) return;
  free(from->held);
  from->held = NULL;
  if (!finish_if_done(from)) return;
  watch_end(e);
  watch_end(from);
}

static bool destination(int fd, struct listener *l, union address *to) {
  socklen_t length = sizeof *to;
  if (l->fixed) {
    *to = l->to;
    return true;
  }
  if (getsockname(fd, &to->any, &length) < 0) return false;
  unmap(to);
  // Where the kernel rewrote the destination (REDIRECT), conntrack knows the one that was meant.
  union address original = {0};
  length = sizeof original;
  int level = to->any.sa_family == AF_INET ? SOL_IP : SOL_IPV6;
  int name = to->any.sa_family == AF_INET ? SO_ORIGINAL_DST : IP6T_SO_ORIGINAL_DST;
  if (getsockopt(fd, level, name, &original, &length) == 0) *to = original;
  return true;
}

// Whether the destination is the listener itself: a connection that nobody redirected, which would go round forever.
static bool is_self(const union address *to, const struct listener *l) {
  struct sockaddr_in6 bound;
  socklen_t length = sizeof bound;
  must(getsockname(l->fd, (struct sockaddr *)&bound, &length), "getsockname");
  return !l->fixed && (to->any.sa_family == AF_INET ? to->v4.sin_port : to->v6.sin6_port) == bound.sin6_port;
}

static int connect_on(int accepted, struct listener *l) {
  union address to = {0}, from = {0};
  socklen_t length = sizeof from;
  if (!destination(accepted, l, &to) || is_self(&to, l)) return -1;
  int fd = socket(to.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (mark) option(fd, SOL_SOCKET, SO_MARK, mark, "SO_MARK");
  option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
  if (l->keep_source) {
    if (getpeername(accepted, &from.any, &length) < 0) goto failed;
    unmap(&from);
    bool v4 = from.any.sa_family == AF_INET;
    option(fd, v4 ? SOL_IP : SOL_IPV6, v4 ? IP_TRANSPARENT : IPV6_TRANSPARENT, 1, "IP_TRANSPARENT");
    option(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1, "IP_BIND_ADDRESS_NO_PORT");
    if (v4) from.v4.sin_port = 0;
    else from.v6.sin6_port = 0;
    if (bind(fd, &from.any, size_of(&from)) < 0) goto failed;
  }
  if (connect(fd, &to.any, size_of(&to)) < 0 && errno != EINPROGRESS) goto failed;
  return fd;
failed:
  close(fd);
  return -1;
}

static void accept_all(struct listener *l) {
  for (int i = 0; i < 64; i++) {
    int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    l->counters[ACCEPTED]++;
    option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
    int server = connect_on(fd, l);
    if (server < 0) {
      l->counters[FAILED]++;
      reset_on_close(fd);
      close(fd);
      continue;
    }
    struct pair *p = calloc(1, sizeof *p);
    if (p == NULL) die("out of memory");
    p->listener = l;
    p->connecting = true;
    p->client = (struct end){.kind = END, .fd = fd, .pair = p, .other = &p->server};
    p->server = (struct end){.kind = END, .fd = server, .pair = p, .other = &p->client, .watched = EPOLLOUT};
    watch(fd, 0, &p->client, EPOLL_CTL_ADD);
    watch(server, EPOLLOUT, &p->server, EPOLL_CTL_ADD);
  }
}

static void on_end(struct end *e, uint32_t events) {
  struct pair *p = e->pair;
  if (p->closed) return;
  if (events & EPOLLERR) {
    close_pair(p, true);
    return;
  }
  if (e == &p->server && p->connecting) {
    if (!(events & EPOLLOUT)) return;
    p->connecting = false;
    p->listener->counters[CONNECTED]++;
    watch_end(&p->client);
    watch_end(&p->server);
    return;
  }
  if ((events & EPOLLOUT) && e->other->held != NULL) drain(e);
  if (p->closed) return;
  if ((events & (EPOLLIN | EPOLLHUP)) && (e->watched & EPOLLIN)) move(e);
  else if (events & EPOLLHUP) close_pair(p, true);
}

static void proxy(int argc, char **argv) {
  static struct listener listeners[MAX_LISTENERS];
  const char *keep[MAX_LISTENERS];
  const char *counters = NULL;
  int count = 0, kept = 0;
  bool reuseport = false;
  for (int i = 0; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(argv[i], "--reuseport") == 0) {
      reuseport = true;
      continue;
    }
    if (value == NULL) die("proxy: %s needs a value", argv[i]);
    if (strcmp(argv[i], "--counters") == 0) counters = value;
    else if (strcmp(argv[i], "--mark") == 0) mark = (int)strtol(value, NULL, 0);
    else if (strcmp(argv[i], "--keep-source") == 0 && kept < MAX_LISTENERS) keep[kept++] = value;
    else if (strcmp(argv[i], "--listen") == 0 && count < MAX_LISTENERS) {
      struct listener *l = &listeners[count++];
      char address[64];
      int to, fields = sscanf(value, "%31[^,],%d,%63[^,],%d", l->name, &l->fd, address, &to);
      if (fields != 2 && fields != 4) die("proxy: --listen %s", value);
      l->fixed = fields == 4;
      if (l->fixed) l->to = parse(address, to);
    } else die("proxy: %s", argv[i]);
    i++;
  }
  if (counters == NULL || count == 0) die("proxy: --counters and --listen are needed");
  uint64_t *map = map_counters(counters);
  epoll_fd = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  for (int i = 0; i < count; i++) {
    struct listener *l = &listeners[i];
    l->kind = LISTENER;
    l->counters = map + i * COUNTS;
    for (int k = 0; k < kept; k++) l->keep_source |= strcmp(keep[k], l->name) == 0;
    l->fd = listen_on(l->fd, !l->fixed, reuseport, mark);
    watch(l->fd, EPOLLIN, l, EPOLL_CTL_ADD);
  }
  for (;;) {
    struct epoll_event events[EVENTS];
    int ready = epoll_wait(epoll_fd, events, EVENTS, -1);
    if (ready < 0 && errno != EINTR) die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < ready; i++) {
      enum kind *kind = events[i].data.ptr;
      if (*kind == LISTENER) accept_all(events[i].data.ptr);
      else on_end(events[i].data.ptr, events[i].events);
    }
    bury();
  }
}

// --------------------------------------------------------------------------------------------------------- server

struct served {
  int fd;
  bool listening, http;
  int matched;  // of the empty line that ends a request head
};

static void serve(struct served *s, uint64_t *counters) {
  static const char response[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
  static const char end[] = "\r\n\r\n";
  ssize_t got = recv(s->fd, scratch, sizeof scratch, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) {
    close(s->fd);
    free(s);
    return;
  }
  counters[s->http ? 1 : 3] += (uint64_t)got;
  if (!s->http) {
    // One byte to a few kilobytes: they fit, as the client waits for them.
    if (send(s->fd, scratch, (size_t)got, MSG_NOSIGNAL) != got) shutdown(s->fd, SHUT_RDWR);
    return;
  }
  for (ssize_t i = 0; i < got; i++) {
    s->matched = scratch[i] == end[s->matched] ? s->matched + 1 : scratch[i] == '\r';
    if (s->matched < 4) continue;
    s->matched = 0;
    if (send(s->fd, response, sizeof response - 1, MSG_NOSIGNAL) < 0) shutdown(s->fd, SHUT_RDWR);
  }
}

static void server(int argc, char **argv) {
  static struct served listeners[2];
  const char *path = NULL;
  int ports[2] = {0, 0};
  for (int i = 0; i + 1 < argc; i += 2) {
    if (strcmp(argv[i], "--counters") == 0) path = argv[i + 1];
    else if (strcmp(argv[i], "--http") == 0) ports[0] = atoi(argv[i + 1]);
    else if (strcmp(argv[i], "--echo") == 0) ports[1] = atoi(argv[i + 1]);
    else die("server: %s", argv[i]);
  }
  if (path == NULL || ports[0] == 0 || ports[1] == 0) die("server: --counters, --http and --echo are needed");
  uint64_t *counters = map_counters(path);
  epoll_fd = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  for (int i = 0; i < 2; i++) {
    listeners[i] = (struct served){.fd = listen_on(ports[i], false, false, 0), .listening = true, .http = i == 0};
    watch(listeners[i].fd, EPOLLIN, &listeners[i], EPOLL_CTL_ADD);
  }
  for (;;) {
    struct epoll_event events[EVENTS];
    int ready = epoll_wait(epoll_fd, events, EVENTS, -1);
    if (ready < 0 && errno != EINTR) die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < ready; i++) {
      struct served *s = events[i].data.ptr;
      if (!s->listening) {
        serve(s, counters);
        continue;
      }
      int fd = accept4(s->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) continue;
      counters[s->http ? 0 : 2]++;
      option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
      struct served *accepted = calloc(1, sizeof *accepted);
      if (accepted == NULL) die("out of memory");
      *accepted = (struct served){.fd = fd, .http = s->http};
      watch(fd, EPOLLIN, accepted, EPOLL_CTL_ADD);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- load

// Latencies in buckets of 1/32 of their power of two, in nanoseconds: at most 3 % wide.
#define SUB 32
static uint64_t buckets[64 * SUB], samples, sum_ns;

static void record(uint64_t ns) {
  int power = 63 - __builtin_clzll(ns | SUB);
  unsigned index = (unsigned)(power - 5) * SUB + (unsigned)(ns >> (power - 5));
  buckets[index]++;
  samples++;
  sum_ns += ns;
}

static double percentile(double p) {
  uint64_t wanted = (uint64_t)((double)samples * p / 100), seen = 0;
  for (unsigned i = 0; i < 64 * SUB; i++) {
    seen += buckets[i];
    if (seen <= wanted || buckets[i] == 0) continue;
    if (i < 2 * SUB) return i;
    unsigned power = i / SUB - 1;
    return (double)((uint64_t)(SUB + i % SUB) << power) + (double)((uint64_t)1 << power) / 2;
  }
  return 0;
}

static void report(const char *what, uint64_t opened, uint64_t failed, uint64_t bytes, uint64_t elapsed) {
  double seconds = (double)elapsed / 1e9;
  printf("{\"what\":\"%s\",\"connections\":%lu,\"failed\":%lu,\"transactions\":%lu,\"bytes\":%lu,\"seconds\":%.6f,"
         "\"perSecond\":%.3f,\"meanUs\":%.3f,\"p50Us\":%.3f,\"p90Us\":%.3f,\"p99Us\":%.3f,\"p999Us\":%.3f}\n",
         what, opened, failed, samples, bytes, seconds, (double)samples / seconds,
         samples ? (double)sum_ns / (double)samples / 1e3 : 0, percentile(50) / 1e3, percentile(90) / 1e3,
         percentile(99) / 1e3, percentile(99.9) / 1e3);
}

struct call {
  int fd;
  uint64_t begun;
  size_t got;
  bool connecting;
};

static int open_to(const union address *to) {
  int fd = must(socket(to->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket");
  option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
  if (connect(fd, &to->any, size_of(to)) < 0 && errno != EINPROGRESS) die("connect: %s", strerror(errno));
  return fd;
}

static void request(struct call *c, size_t size) {
  c->got = 0;
  c->begun = now_ns();
  if (send(c->fd, scratch, size, MSG_NOSIGNAL) != (ssize_t)size) die("send: %s", strerror(errno));
}

// Whether the whole answer is there.
static bool answer(struct call *c, size_t size) {
  ssize_t got = recv(c->fd, scratch, size, 0);
  if (got < 0 && errno == EAGAIN) return false;
  if (got <= 0) die("a connection ended: %s", got == 0 ? "closed by the other side" : strerror(errno));
  c->got += (size_t)got;
  return c->got == size;
}

static void rr(const union address *to, int count, int active, uint64_t ns, size_t size, const char *what) {
  struct call *calls = calloc((size_t)count, sizeof *calls);
  if (calls == NULL) die("out of memory");
  struct epoll_event events[EVENTS];
  // A window of connects, so that no backlog on the way overflows.
  int opened = 0, ready = 0;
  while (ready < count) {
    for (; opened < count && opened - ready < 64; opened++) {
      calls[opened] = (struct call){.fd = open_to(to), .connecting = true};
      watch(calls[opened].fd, EPOLLOUT, &calls[opened], EPOLL_CTL_ADD);
    }
    int n = must(epoll_wait(epoll_fd, events, EVENTS, 10000), "epoll_wait");
    if (n == 0) die("%d of %d connections were ready, and then none for 10 s", ready, count);
    for (int i = 0; i < n; i++) {
      struct call *c = events[i].data.ptr;
      if (c->connecting) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) die("connect: %s", strerror(error));
        c->connecting = false;
        watch(c->fd, EPOLLIN, c, EPOLL_CTL_MOD);
        request(c, size);
      } else if (answer(c, size)) {
        ready++;
      }
    }
  }
  uint64_t begin = now_ns(), end = begin + ns, now = begin, bytes = 0;
  for (int i = 0; i < active; i++) request(&calls[i], size);
  while (now < end) {
    int n = must(epoll_wait(epoll_fd, events, EVENTS, 1000), "epoll_wait");
    if (n == 0 && now_ns() > end) break;
    for (int i = 0; i < n; i++) {
      struct call *c = events[i].data.ptr;
      if (!answer(c, size)) continue;
      now = now_ns();
      record(now - c->begun);
      bytes += size;
      request(c, size);
    }
  }
  report(what, (uint64_t)count, 0, bytes, now_ns() - begin);
  for (int i = 0; i < count; i++) {
    reset_on_close(calls[i].fd);
    close(calls[i].fd);
  }
}

static void crr(const union address *to, int parallel, uint64_t ns) {
  struct call *calls = calloc((size_t)parallel, sizeof *calls);
  if (calls == NULL) die("out of memory");
  uint64_t begin = now_ns(), end = begin + ns, opened = 0, failed = 0;
  for (int i = 0; i < parallel; i++, opened++) {
    calls[i] = (struct call){.begun = now_ns(), .fd = open_to(to), .connecting = true};
    watch(calls[i].fd, EPOLLOUT, &calls[i], EPOLL_CTL_ADD);
  }
  for (int running = parallel; running > 0;) {
    struct epoll_event events[EVENTS];
    int n = must(epoll_wait(epoll_fd, events, EVENTS, 5000), "epoll_wait");
    if (n == 0) die("%d connections hang for 5 s", running);
    for (int i = 0; i < n; i++) {
      struct call *c = events[i].data.ptr;
      int error = 0;
      socklen_t length = sizeof error;
      if (c->connecting) getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
      if (c->connecting && error == 0) {
        c->connecting = false;
        watch(c->fd, EPOLLIN, c, EPOLL_CTL_MOD);
        if (send(c->fd, scratch, 1, MSG_NOSIGNAL) == 1) continue;
        error = errno;
      } else if (error == 0) {
        ssize_t got = recv(c->fd, scratch, 1, 0);
        if (got < 0 && errno == EAGAIN) continue;
        error = got == 1 ? 0 : got == 0 ? EPIPE : errno;
      }
      uint64_t now = now_ns();
      if (error == 0 && now < end) record(now - c->begun);
      failed += error != 0;
      reset_on_close(c->fd);
      close(c->fd);
      if (now >= end) {
        running--;
        continue;
      }
      *c = (struct call){.begun = now_ns(), .fd = open_to(to), .connecting = true};
      watch(c->fd, EPOLLOUT, c, EPOLL_CTL_ADD);
      opened++;
    }
  }
  report("crr", opened, failed, samples, end - begin);
}

// The descriptor and not the sysctl: whatever ends this process, the kernel stops counting.
static void stats(void) {
  union bpf_attr attr = {.enable_stats.type = BPF_STATS_RUN_TIME};
  must((int)syscall(SYS_bpf, BPF_ENABLE_STATS, &attr, sizeof attr), "BPF_ENABLE_STATS");
  puts("on");
  fflush(stdout);
  for (;;) pause();
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  signal(SIGPIPE, SIG_IGN);
  allow_many_files();
  if (strcmp(what, "proxy") == 0) proxy(argc - 2, argv + 2);
  if (strcmp(what, "server") == 0) server(argc - 2, argv + 2);
  if (strcmp(what, "stats") == 0) stats();
  if (argc < 6) die("usage: proxy|server|rr|crr|hold|stats ...");
  union address to = parse(argv[2], atoi(argv[3]));
  int count = atoi(argv[4]);
  epoll_fd = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  uint64_t ms = strtoull(argv[argc > 6 && strcmp(what, "hold") == 0 ? 6 : 5], NULL, 10);
  if (strcmp(what, "rr") == 0) rr(&to, count, count, ms * 1000000, argc > 6 ? strtoul(argv[6], NULL, 10) : 1, what);
  else if (strcmp(what, "crr") == 0) crr(&to, count, ms * 1000000);
  else if (strcmp(what, "hold") == 0 && argc == 7) rr(&to, count, atoi(argv[5]), ms * 1000000, 1, what);
  else die("%s", what);
  return 0;
}
