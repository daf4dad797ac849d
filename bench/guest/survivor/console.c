// The serial console: one JSON object per line. Invariant: a line is one write(), so lines of
// different threads never mix; only the kernel's own messages can cut in, and those are silenced.
#include "survivor.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

static int out = STDOUT_FILENO, in = STDIN_FILENO;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t failure_lock = PTHREAD_MUTEX_INITIALIZER;
static char failure[256];

void console_open(void) {
    if (strcmp(cfg.tty, "-") != 0) {
        int fd = open(cfg.tty, O_RDWR | O_NOCTTY);
        if (fd < 0) { perror(cfg.tty); exit(1); }
        in = out = fd;
    }
    struct termios raw;
    if (tcgetattr(in, &raw) == 0) {
        cfmakeraw(&raw);
        raw.c_cflag |= CLOCAL;
        tcsetattr(in, TCSANOW, &raw);
    }
}

static void put_line(const char *line, size_t len) {
    pthread_mutex_lock(&lock);
    while (len > 0) {
        ssize_t n = write(out, line, len);
        if (n < 0 && errno != EINTR) break; // nobody to tell
        if (n > 0) { line += n; len -= n; }
    }
    pthread_mutex_unlock(&lock);
}

void say(const char *format, ...) {
    char line[LINE_MAX_BYTES];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (len < 0) return;
    if ((size_t)len > sizeof line - 2) len = sizeof line - 2;
    line[len++] = '\n';
    put_line(line, len);
}

int console_read(char *byte) {
    for (;;) {
        ssize_t n = read(in, byte, 1);
        if (n == 1) return 1;
        if (n == 0 || errno != EINTR) return 0;
    }
}

void fail(const char *what, const char *format, ...) {
    char why[192];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    pthread_mutex_lock(&failure_lock);
    bool first = failure[0] == 0;
    if (first) snprintf(failure, sizeof failure, "%s: %s", what, why);
    pthread_mutex_unlock(&failure_lock);
    // Only the first is printed: a broken disk fails on every block.
    if (first) say("{\"ev\":\"fail\",\"what\":\"%s\",\"why\":\"%s\"}", what, why);
}

bool failed(char *first, size_t len) {
    pthread_mutex_lock(&failure_lock);
    snprintf(first, len, "%s", failure);
    pthread_mutex_unlock(&failure_lock);
    return first[0] != 0;
}
